"""Signals that ask a training to stop: the first is granted at the next update, the second at once."""

import signal
import threading
from types import FrameType
from typing import Any, Self

_ASKED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Signals:
    """Within it, SIGINT, SIGTERM and SIGHUP are noted in `caught` instead of ending the process.

    In a thread other than the main one nothing is caught, because Python hands signals to the main thread.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def leave(self) -> None:
        """End as the signal asked: KeyboardInterrupt for SIGINT, else exit code 128 + its number."""
        if self.caught is signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is not None:
            raise SystemExit(128 + self.caught)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _ASKED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.caught is not None
        self.caught = signal.Signals(number)
        if again:
            self.leave()
