"""What a process of ours does when it is told to end, and when nobody listens."""

import contextlib
import io
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

from train import runs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, which is saved and can be continued.

    Attributes:
      signum: the signal.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Gathers the first signal in the list that it yields; the next ones act as ever.

    Only in the main thread of a launched run: what else happens in a process is not ours.
    """
    signals = []
    if not runs.launched() or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {}

    def note(signum, frame):
        signals.append(signum)
        restore()
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after these steps; again to stop at once\n")

    def restore():
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    for signum in SIGNALS:
        # What `nohup` has a process ignore stays ignored.
        if signal.getsignal(signum) != signal.SIG_IGN:
            previous[signum] = signal.signal(signum, note)
    try:
        yield signals
    finally:
        restore()


class _Outliving:
    """A stream that drops what it cannot write: a closed pipe or a full disk ends no run."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def outlive_streams() -> None:
    """Makes what is printed no matter of life: what fails to be written is dropped."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, _Outliving):
            continue
        if stream is None:
            # It was closed: what is opened next must not take its number.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = io.StringIO()
        # A text may hold what a terminal cannot show.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Outliving(stream))


@contextlib.contextmanager
def leave_on_signals(workdir: pathlib.Path) -> Iterator[None]:
    """Makes signals end the process at once, where the training loop does not defer them.

    Python's own way, an exception from anywhere, may be swallowed by a callback of JAX, and may
    crash the interpreter as it unwinds. All files are either whole or lines, so this loses nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum, frame):
        see = f"; see {workdir}" if workdir.exists() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"\ninterrupted{see}\n".encode())
        os._exit(128 + signum)

    previous = {
        signum: signal.signal(signum, leave)
        for signum in SIGNALS
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
