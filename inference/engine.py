"""Many conversations decoded at once, for the browser: one thread, one reading of the weights a
step for all that wait for an answer.

Each conversation has a row of one KV cache to itself while it lasts. When rows run out, the
one that was silent longest loses its own; its next turn reads what it had said once more.
"""

import contextlib
import itertools
import queue
import threading
from dataclasses import dataclass, field

import torch

from common.config import UserError
from inference.generate import Decoding, Sampler, pick


@dataclass
class Request:
    """An answer in the making. `tokens` gets its ids, then None or the exception that ended it."""

    embeddings: torch.Tensor  # (1, T, C)
    max_tokens: int
    stop: int
    sampler: Sampler
    row: int
    token: torch.Tensor | None = None  # (1,), the last one, not yet read
    n: int = 0
    cancelled: bool = False
    tokens: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)  # the thread is done with it


class Engine:
    """The thread that decodes, and who sits in which row."""

    def __init__(self, decoder, rows=8, compile=False):
        self.decoding = Decoding(decoder, rows, compile=compile)
        self.requests = queue.SimpleQueue()
        self.seats = [None] * rows  # the conversation in each row
        self.busy, self.last_used = set(), [0] * rows
        self.clock, self.lock = itertools.count(1), threading.Lock()
        threading.Thread(target=self._run, name="decoding", daemon=True).start()

    @contextlib.contextmanager
    def seat(self, conversation):
        """Keep a row for a Conversation while it is at work; UserError if all are at work."""
        with self.lock:
            row = self._row_for(conversation)
            if self.seats[row] is not conversation:
                self.seats[row], conversation.row = conversation, row
                self.decoding.cut(0, row)
            self.busy.add(row)
        try:
            yield
        finally:
            with self.lock:
                self.busy.discard(row)
                self.last_used[row] = next(self.clock)

    def _row_for(self, conversation):
        if conversation in self.seats:
            return self.seats.index(conversation)
        free = [row for row in range(len(self.seats)) if row not in self.busy]
        if not free:
            raise UserError("everybody talks at once here; ask again in a moment")
        # An empty one, the lowest, or the one silent longest: a step computes from the first
        # busy row to the last.
        return min(free, key=lambda row: (self.seats[row] is not None, self.last_used[row], row))

    def leave(self, conversation):
        """Free the row of a conversation that is over."""
        with self.lock:
            if conversation in self.seats:
                row = self.seats.index(conversation)
                self.seats[row], self.last_used[row] = None, 0

    def generate(self, decoding, embeddings, max_tokens, stop, sampler, row):
        """As decode.generate, for a row whose conversation has a seat."""
        request = Request(embeddings, max_tokens, stop, sampler, row)
        self.requests.put(request)
        try:
            while (token := request.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            request.cancelled = True
            request.gone.wait()

    # ------------------------------------------------------------------------------ in the thread

    def _run(self):
        active = {}  # row -> Request
        while True:
            try:
                self._admit(active)
                self._drop_cancelled(active)
                if active:
                    self._step(active)
            except Exception as error:  # nobody may wait for ever for a thread that died
                for request in list(active.values()):
                    self._finish(active, request, error)

    def _admit(self, active):
        """Begin one answer that was asked for, if any; wait for one if there is nothing to do."""
        try:
            request = self.requests.get(block=not active)
        except queue.Empty:
            return
        active[request.row] = request
        if not request.cancelled:
            logits = self.decoding.prefill(request.embeddings, request.row)
            self._deliver(active, request, request.sampler(logits))

    def _drop_cancelled(self, active):
        for request in [request for request in active.values() if request.cancelled]:
            self._finish(active, request)

    def _step(self, active):
        """One more token for everybody."""
        first, last = min(active), max(active) + 1
        ids = torch.zeros(last - first, dtype=torch.long, device=self.decoding.device)
        for row, request in active.items():
            ids[row - first] = request.token[0]
        waiting = set(range(first, last)) - active.keys()
        logits = self.decoding.step(ids, first, waiting)
        likeliest = pick(logits)
        for row, request in list(active.items()):
            i, greedy = row - first, request.sampler.greedy
            token = likeliest[i : i + 1] if greedy else request.sampler(logits[i : i + 1])
            self._deliver(active, request, token)

    def _deliver(self, active, request, token):
        number = token.item()
        if number == request.stop:
            return self._finish(active, request)
        request.token, request.n = token, request.n + 1
        request.tokens.put(number)
        if request.n == request.max_tokens or not self.decoding.room(request.row):
            self._finish(active, request)

    def _finish(self, active, request, error=None):
        del active[request.row]
        request.tokens.put(error)
        request.gone.set()
