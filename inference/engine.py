"""Continuous batching for the browser: one thread decodes all active conversations as one batch.

A conversation gets a free row of the KV cache, preferably one that holds a prefix of its prompt.
`generate`, in the event loop, queues a Request; the thread runs `_admit` (prefill), then `_step`s.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inference.conversation import Conversation, decoder_of
from inference.generate import Decoding, Sampler, pick


@dataclass
class Request:
    """An answer in progress."""

    conversation: Conversation
    sampler: Sampler
    send: Callable  # gets each id, then None or the exception that ended the answer
    ids: list  # the prompt, then also the answer
    longest: int  # number of ids at which the answer ends
    cancelled: bool = False


class Engine:
    """The thread that decodes, and its queue of requests."""

    def __init__(self, model, rows):
        self.decoding = Decoding(decoder_of(model), rows)
        self.decoding.prepare()
        self.waiting, self.active = queue.SimpleQueue(), {}  # active: row -> Request
        # Least recently used first, and of those never used the lowest: a step computes all rows
        # from the first active one to the last.
        self.free = list(range(rows))
        threading.Thread(target=self._run, name="decoding", daemon=True).start()

    async def generate(self, conversation, max_tokens, sampler):
        """Yield the ids that follow a Conversation's prompt, without <|end|>."""
        loop, answer = asyncio.get_running_loop(), asyncio.Queue()

        def send(item):
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(answer.put_nowait, item)

        ids = conversation.ids()
        request = Request(conversation, sampler, send, ids, len(ids) + max_tokens)
        self.waiting.put(request)
        try:
            while (item := await answer.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            request.cancelled = True

    def _run(self):
        while True:
            try:
                self._admit()
                for row in [row for row, request in self.active.items() if request.cancelled]:
                    self._finish(row)
                if self.active:
                    self._step()
            except Exception as error:  # of all rows; a request must not wait for a dead thread
                for row in list(self.active):
                    self._finish(row, error)

    def _admit(self):
        """Start the next request if a row is free; wait for one if idle. It gets the row with the
        longest common prefix, if that is most of either; else the least recently used."""
        if not self.free:
            return
        try:
            request = self.waiting.get(block=not self.active)
        except queue.Empty:
            return
        if request.cancelled:
            return
        ids, decoding = request.ids, self.decoding
        row = max(self.free, key=lambda row: decoding.common_prefix(ids, row))
        if decoding.common_prefix(ids, row) <= min(len(ids), decoding.cache.lengths[row]) / 2:
            row = self.free[0]
        self.free.remove(row)
        self.active[row] = request
        with self._own_errors(row):
            request.sampler.begin(ids)
            x = request.conversation.embeddings(ids, decoding.reuse_prefix(ids, row))
            self._deliver(row, request.sampler(decoding.prefill(x, row)).item())

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
            with self._own_errors(row):
                token = most_likely[i] if greedy else request.sampler(logits[i : i + 1]).item()
                self._deliver(row, token)

    @contextlib.contextmanager
    def _own_errors(self, row):
        """An error in this context ends the answer in `row`, and no other."""
        try:
            yield
        except Exception as error:
            self._finish(row, error)

    def _deliver(self, row, token):
        request = self.active[row]
        if token == request.conversation.tokenizer.end:
            return self._finish(row)
        request.ids.append(token)
        request.send(token)
        if len(request.ids) == request.longest or not self.decoding.room(row):
            self._finish(row)

    def _finish(self, row, error=None):
        self.active.pop(row).send(error)
        self.free.append(row)
