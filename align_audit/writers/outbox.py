"""Messages on their way out of the process, by a thread of its own: training waits for it nowhere but at the end."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")

_TOO_LATE = "it was not answered when the run ended"


class Outbox(Generic[Message]):
    """Messages on their way out, one after the other, by a thread that ends with the process.

    Args:
        post: posts a message until a deadline, and gives the reason where it could not.
        keep: takes a message that was not posted, and why. Called from either thread.
        seconds: for each message, and for all that is left when it is closed.
        most: messages that may wait; what comes on top is kept at once.
        name: of the thread.
        at_exit: close it where the process ends and nobody has: a training that breaks ends no run.
    """

    def __init__(
        self,
        post: Callable[[Message, float], str | None],
        keep: Callable[[Message, str], None],
        seconds: float,
        *,
        most: int,
        name: str,
        at_exit: bool = True,
    ) -> None:
        self._post, self._keep, self._seconds = post, keep, seconds
        self._most, self._name, self._at_exit = most, name, at_exit
        self._waiting: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._under_way: Message | None = None
        self._given_up = False
        self._end = float("inf")

    @property
    def full(self) -> bool:
        """Do as many wait as may?"""
        return self._waiting.qsize() >= self._most

    def put(self, message: Message) -> None:
        """Take a message; nothing is waited for."""
        if self.full:
            self._keep(message, f"{self._most} others wait to be posted")
            return
        self._waiting.put(message)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
            if self._at_exit:  # the last alerts are those that count
                atexit.register(self.close)

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is under way, ``seconds`` at most. What was not posted then is kept as unsent.

        Args:
            seconds: None: those that a message has.
        """
        if self._thread is None:
            return
        atexit.unregister(self.close)
        seconds = self._seconds if seconds is None else max(seconds, 0.0)
        self._end = time.monotonic() + seconds
        self._waiting.put(None)
        self._thread.join(seconds)
        self._thread = None
        with self._lock:
            self._given_up = True
            rest = [] if self._under_way is None else [self._under_way]
        while not self._waiting.empty():
            if (message := self._waiting.get()) is not None:
                rest.append(message)
        self._waiting.put(None)  # for a thread that comes back after all
        for message in rest:
            self._keep(message, _TOO_LATE)

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            with self._lock:
                if self._given_up:  # taken from the queue just before whoever closed it looked there
                    self._keep(message, _TOO_LATE)
                    return
                self._under_way = message
            try:
                reason = self._post(message, min(time.monotonic() + self._seconds, self._end))
            except Exception as error:
                reason = f"{type(error).__name__} was raised"  # whose words may hold the URL
            with self._lock:
                if self._given_up:
                    return  # who closed it has kept the message
                self._under_way = None
                if reason is not None:
                    self._keep(message, reason)
