"""SIGINT and SIGTERM end a command cleanly, whenever they arrive. Imports nothing heavy."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code of a command that a signal keeps from finishing


class Stop:
    """The handler of SIGINT and SIGTERM while a command runs.

    Until `remember` is called, nothing is open that must be closed, and a signal ends the process at once. From then on a
    signal sets `received` and calls `on_stop`; the command ends itself. The handler raises no KeyboardInterrupt: CPython
    drops one that is raised in a destructor or a weak reference's callback, and one that is raised in the methods of a
    `threading.Condition` can leave its lock held.

    exit_code: of the process that ends at once.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code, self.received = exit_code, False
        self._on_stop: Callable[[], object] | None = None

    def remember(self, on_stop: Callable[[], object] = lambda: None) -> None:
        """From now on, set `received` and call this."""
        self._on_stop = on_stop

    def __call__(self, sig: int, frame: FrameType | None) -> None:
        if self._on_stop is None:
            os.write(2, f"ended by {signal.Signals(sig).name} before anything was open\n".encode())
            os._exit(self.exit_code)
        self.received = True
        self._on_stop()


@contextmanager
def stop_signals(exit_code: int = 0) -> Iterator[Stop]:
    """Inside, `Stop` handles the signals; the caller's own, where it has installed one. Once a signal was received, the
    process is about to end, and further ones are ignored."""
    installed = signal.getsignal(signal.SIGTERM)
    if isinstance(installed, Stop):
        yield installed
        return
    stop = Stop(exit_code)
    before = {one: signal.signal(one, stop) for one in SIGNALS}
    try:
        yield stop
    finally:
        if stop.received:
            for one in SIGNALS:  # while the interpreter finalizes, which takes Python's handlers away
                atexit.register(signal.signal, one, signal.SIG_IGN)
        else:
            for one, handler in before.items():
                signal.signal(one, handler)
