"""Ctrl-C and SIGTERM as a polite request: save first, then stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
    """While its `with` block lasts, the first signal sets `requested`; a second Ctrl-C stops at once.

    Under torchrun a Ctrl-C arrives twice (from the terminal and from torchrun), so there `patient=True` waits however
    often it comes. Outside the main thread Python allows no handlers: signals then keep the meaning they had.
    """

    def __init__(self, *, patient: bool, announce: bool) -> None:
        self.requested = False
        self._patient, self._announce = patient, announce
        self._previous: dict[int, Any] = {}
        self._interrupts = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and not self._patient:
            raise KeyboardInterrupt
        if self._announce and not self.requested:
            again = "" if self._patient else " (Ctrl-C again stops at once)"
            os.write(2, f"\nsaving, then stopping{again}\n".encode())
        self.requested = True
