"""The one thread that owns the model: requests wait in a bounded queue and are scored in batches.

A batch is what waits when the model becomes free, up to `batch_size`: nobody waits for a batch to fill. A
request that cannot be answered fails alone; the others of its batch are not touched.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import Recommender
from gdrt_ds.inference.recommending import KnownTitles, Ranker, unknown_titles

log = logging.getLogger("gdrt_ds.serving")
"""What went wrong behind an answer of status 500; without a handler of the user's it goes to stderr."""


class Busy(Exception):
    """The queue is full, or the service is stopping; the text says which."""


class TooLate(Exception):
    """The request waited longer than `max_wait_s`."""


@dataclass(frozen=True)
class Answer:
    """What is said to one request.

    Attributes:
        recommendations: the list, as `recommend` returns it.
        unknown: titles that the catalogue does not have; their text was used.
        dropped: oldest titles that `data.history_length` or `prompt.max_length` left out.
    """

    recommendations: list[dict[str, Any]]
    unknown: list[str]
    dropped: int


@dataclass
class Request:
    """One history that waits.

    Attributes:
        history: titles or names of items, oldest first.
        k: length of the list.
        future: gets the answer.
        since: when it came, in seconds of time.monotonic.
        texts: what stands for the items, known when its batch begins.
        prompt, dropped: its tokens and the titles left out, known then too.
    """

    history: list[str]
    k: int
    future: Future
    since: float = field(default_factory=time.monotonic)
    texts: list[str] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    dropped: int = 0


class Worker:
    """Answers requests on a thread of its own.

    Args:
        recommender: what `gdrt_ds.open_run` returns; after `start` only the worker's thread uses it.
        batch_size: histories scored at once.
        max_queue: requests that may wait.
        max_wait_s: seconds after which a waiting request is not computed any more.
        on_batch: called after every batch with its size and its seconds.
    """

    def __init__(
        self,
        recommender: Recommender,
        batch_size: int = 8,
        max_queue: int = 64,
        max_wait_s: float = 30.0,
        on_batch: Callable[[int, float], None] | None = None,
    ):
        self.recommender = recommender
        self.titles = KnownTitles(recommender.catalogue.entries)
        self.known = self.titles.texts
        self.batch_size = batch_size
        self.max_wait_s = max_wait_s
        self._on_batch = on_batch
        self._ranker = Ranker(recommender)
        self._queue: queue.Queue[Request | None] = queue.Queue(max_queue)
        self._stopping = threading.Event()
        self._door = threading.Lock()  # nothing enters the queue behind the word that it is the last
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # -- from any thread ---------------------------------------------------------------------------
    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    def submit(self, history: list[str], k: int) -> Future:
        """Accepts a request; its future gets an `Answer`, a UserError or a `TooLate`.

        Requests may come before `start`; they wait.

        Raises:
            Busy: it is not accepted.
        """
        request = Request(history, k, Future())
        with self._door:
            if self._stopping.is_set():
                raise Busy("the service is stopping")
            try:
                self._queue.put_nowait(request)
            except queue.Full:
                raise Busy(f"{self._queue.maxsize} requests are waiting already") from None
        return request.future

    def stop(self) -> None:
        """Answers what was accepted, then ends the thread."""
        with self._door:
            first = not self._stopping.is_set()
            self._stopping.set()
        if first:
            self._queue.put(None)
        self._thread.join()

    # -- on the worker's thread --------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            batch, last = self._next_batch()
            if batch:
                start = time.monotonic()
                self._answer(batch)
                if self._on_batch is not None:
                    self._on_batch(len(batch), time.monotonic() - start)
            if last:
                return

    def _next_batch(self) -> tuple[list[Request], bool]:
        """What waits now, at least one request; and whether it is the last."""
        item = self._queue.get()
        batch = []
        while item is not None:
            batch.append(item)
            if len(batch) == self.batch_size:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _answer(self, batch: list[Request]) -> None:
        ready = [request for request in batch if self._prepare(request)]
        if ready:
            self._score(ready)
        for request in batch:
            self.recommender.encoder.forget(unknown_titles([request.texts], self.known))

    def _prepare(self, request: Request) -> bool:
        """Makes the prompt; whether the request goes on to the model."""
        if not request.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() - request.since > self.max_wait_s:
            request.future.set_exception(TooLate(f"waited more than {self.max_wait_s:g} s"))
            return False
        try:
            request.texts = self.titles.texts_of(request.history)
            encoded = self.recommender.encode_titles(request.texts)
        except Exception as error:  # a tokenizer may fail on any text; the others of the batch go on
            if not isinstance(error, UserError):
                log.error("a prompt could not be made", exc_info=error)
            request.future.set_exception(error)
            return False
        request.prompt = encoded.input_ids.tolist()
        request.dropped = encoded.num_dropped
        return True

    def _score(self, ready: list[Request]) -> None:
        try:
            lists = self._ranker.lists([r.prompt for r in ready], [r.k for r in ready])
        except Exception as error:
            if len(ready) == 1:
                log.error("the model failed on a request", exc_info=error)
                ready[0].future.set_exception(error)
                return
            # One of them may be the cause, or the batch is too large for memory: each is tried alone.
            for request in ready:
                self._score([request])
            return
        for request, found in zip(ready, lists, strict=True):
            unknown = unknown_titles([request.texts], self.known)
            request.future.set_result(Answer(found, unknown, request.dropped))
