"""Ctrl-C: the first asks politely, the second leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Interrupt:
    """While it is entered, the first Ctrl-C calls ``politely`` in a thread; the second interrupts.

    Enter it in the main thread. SIGTERM counts as Ctrl-C, and so does SIGHUP: a job of CI that is ended,
    or a terminal that is closed, leaves nothing running behind.
    """

    def __init__(self, politely: Callable[[], None]) -> None:
        """``politely`` must return soon and must not raise."""
        self._politely = politely
        self._before: dict[int, object] = {}
        self.happened = False

    def __enter__(self) -> Interrupt:
        """Takes the signals."""
        for number in ENDING_SIGNALS:
            self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt
        self.happened = True
        # The main thread may be inside gRPC with its locks held, so the work is done elsewhere.
        threading.Thread(target=self._politely, name="interrupt", daemon=True).start()
