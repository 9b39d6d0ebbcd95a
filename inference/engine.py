"""Continuous batching for the browser: one thread decodes all conversations that wait for an
answer, in one pass over the weights per step.

A conversation takes whatever row of the KV cache is free, preferably the one that still holds the
beginning of its prompt, of which only the rest is prefilled.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inference.conversation import Conversation
from inference.generate import Decoding, Sampler, pick


@dataclass
class Request:
    """An answer in progress."""

    conversation: Conversation
    max_tokens: int
    sampler: Sampler
    send: Callable  # gets each id, then None or the exception that ended the answer
    ids: list  # the prompt, then also the answer
    n_prompt: int
    cancelled: bool = False


class Engine:
    """The thread that decodes, and its queue of requests."""

    def __init__(self, decoder, rows=8, compile=False):
        self.decoding = Decoding(decoder, rows, compile=compile)
        self.waiting, self.active = queue.SimpleQueue(), {}  # active: row -> Request
        self.last_used, self.clock = [0] * rows, itertools.count(1)
        threading.Thread(target=self._run, name="decoding", daemon=True).start()

    async def generate(self, conversation, max_tokens, sampler):
        """Yield the ids that follow a Conversation's prompt, without <|end|>."""
        loop, answer = asyncio.get_running_loop(), asyncio.Queue()

        def send(item):
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(answer.put_nowait, item)

        ids = conversation.ids()
        request = Request(conversation, max_tokens, sampler, send, ids, len(ids))
        self.waiting.put(request)
        try:
            while (item := await answer.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            request.cancelled = True

    # ------------------------------------------------------------------------------ in the thread

    def _run(self):
        while True:
            try:
                self._admit()
                for row in [row for row, request in self.active.items() if request.cancelled]:
                    self._finish(row)
                if self.active:
                    self._step()
            except Exception as error:  # nobody may wait for a thread that has died
                for row in list(self.active):
                    self._finish(row, error)

    def _admit(self):
        """Start the next request, if there is one and a free row; wait for one if idle."""
        if len(self.active) == len(self.last_used):
            return
        try:
            request = self.waiting.get(block=not self.active)
        except queue.Empty:
            return
        if request.cancelled:
            return
        row = self._pick_row(request.ids)
        self.active[row] = request
        request.sampler.begin(request.ids)
        start = self.decoding.reuse_prefix(request.ids, row)
        logits = self.decoding.prefill(request.conversation.embeddings(start), row)
        self._deliver(row, request.sampler(logits).item())

    def _pick_row(self, ids):
        """The free row with the longest common prefix with ids, if that is most of the one or the
        other; else the one unused for longest."""
        free = [row for row in range(len(self.last_used)) if row not in self.active]
        shared = {row: self.decoding.common_prefix(ids, row) for row in free}
        best = max(free, key=shared.get)
        if shared[best] > min(len(ids), self.decoding.length(best)) / 2:
            return best
        # Of those never used the first: a step computes all rows from the first to the last active.
        return min(free, key=self.last_used.__getitem__)

    def _step(self):
        """One more token for every active row."""
        first, end = min(self.active), max(self.active) + 1
        last_ids = [self.active[row].ids[-1] if row in self.active else 0
                    for row in range(first, end)]
        waiting = set(range(first, end)) - self.active.keys()
        logits = self.decoding.step(
            torch.tensor(last_ids, device=self.decoding.device), first, waiting)
        most_likely = pick(logits).tolist()
        for row, request in list(self.active.items()):
            i, greedy = row - first, request.sampler.greedy
            token = most_likely[i] if greedy else request.sampler(logits[i : i + 1]).item()
            self._deliver(row, token)

    def _deliver(self, row, token):
        request = self.active[row]
        if token == request.conversation.tokenizer.end:
            return self._finish(row)
        request.ids.append(token)
        request.send(token)
        n = len(request.ids) - request.n_prompt
        if n == request.max_tokens or not self.decoding.room(row):
            self._finish(row)

    def _finish(self, row, error=None):
        self.active.pop(row).send(error)
        self.last_used[row] = next(self.clock)
