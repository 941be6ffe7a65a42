"""Commands that are stopped: by Ctrl-C, or by the signals with which systems end a process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# By name: Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """A command that a signal stopped; `code` is the exit code that shells give it."""

    def __init__(self, number: signal.Signals, kept: str) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        super().__init__(f"stopped by {name}" + (f": {kept}" if kept else ""))
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped for a signal that comes inside, after all that was open is closed.

    The signal is a KeyboardInterrupt until then, as Ctrl-C always is; the argument of one that is
    raised inside says what is kept. A signal that is ignored (`nohup`) stays ignored.
    """
    received = [signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(received[-1], str(error)) from error
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
