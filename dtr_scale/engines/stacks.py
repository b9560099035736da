"""Write the stacks of a rank that hangs, also where it is stopped or something holds its GIL.

The file is written by C code: on a signal, or by a timer that the watch of the rank puts off as
long as it can run.
"""

import faulthandler
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import torch

log = logging.getLogger(__name__)

STACKS = "stacks"
SIGNAL = signal.SIGUSR2


class Stacks:
    """A rank's file in the run directory, from `open` to `close`.

    It is removed in the end where nothing was written to it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._rank = rank
        self._path = folder / f"rank_{rank:05d}.txt"
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Be ready to write; a signal, SIGUSR2, does so from here on."""
        with suppress(OSError):  # the run goes on without
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            faulthandler.register(SIGNAL, self._file, all_threads=True)

    def write(self, reason: str) -> None:
        """Write where all threads are at this moment, and what NCCL has recorded."""
        if not self._file:
            return
        self.put_off(None)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        title = (
            f"\n{time} rank {self._rank}, pid {os.getpid()} on {socket.gethostname()}: {reason}\n"
        )
        with suppress(OSError, ValueError):  # it may be closed at this moment
            self._file.write(title.encode())
            self._file.flush()
            faulthandler.dump_traceback(self._file)
        if torch.cuda.is_available():
            with suppress(OSError):
                self._write_collectives()

    def put_off(self, seconds: float | None) -> None:
        """Let C code write the stacks and end the process, if this is not called again in time.

        It ends because nobody else can end it from outside, and no thread of it from inside.
        """
        if self._file:
            faulthandler.cancel_dump_traceback_later()
        if self._file and seconds is not None:
            with suppress(ValueError):
                faulthandler.dump_traceback_later(seconds, file=self._file, exit=True)

    def close(self) -> None:
        self.put_off(None)
        if not self._file:
            return
        faulthandler.unregister(SIGNAL)
        self._file.close()
        self._file = None
        with suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()
            self.folder.rmdir()  # only where it is empty

    def _write_collectives(self) -> None:
        # NCCL's flight recorder, which torch fills by itself: the last 2,000 collectives.
        from torch._C import _distributed_c10d as c10d

        place = self.folder / f"rank_{self._rank:05d}_nccl.json"
        dump: Callable[[], bytes] = getattr(c10d, "_dump_nccl_trace_json")  # noqa: B009
        place.write_bytes(dump())
