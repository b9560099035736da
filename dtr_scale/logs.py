"""Set up logging: all of rank 0, warnings of the other ranks; show how far long work is.

Passwords are left out of URLs.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_LINE_SECONDS = 30.0
_COLUMNS = 80  # of a terminal that does not tell its size

# A password may hold any character but "@", as SQLAlchemy reads it; a port is no password.
_USER = re.compile(r"(?<=://)([^/?#]*@|[^:/@]*:(?!\d*/)[^@]*@([^/?#]*@)?)")
# PostgreSQL's passfile is a path and stays.
_SECRET = re.compile(
    r"(?<=[?&;#])[^=&;#]*(pass(?!file)|pwd|token|secret|credential|signature|api_?key|access_?key)"
    r"[^=&;#]*=[^&;#]*[&;]?",
    re.IGNORECASE,
)


def without_password(url: str) -> str:
    """Return a URL as it may be shown and stored: without user, password and secrets in its query.

    All else stays as it is: `urlunsplit` would turn sqlite:///x into sqlite:/x, which is no place.
    """
    return _SECRET.sub("", _USER.sub("", url, count=1)).rstrip("?&;#")


class _BesideProgressBar(logging.Handler):
    """Write to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:
            self.handleError(record)  # whoever read the output is gone; the run goes on


def setup_logging(rank: int) -> None:
    """Send this package's messages to stderr; ranks above 0 say who they are."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _BesideProgressBar()
    handler.setFormatter(_Formatter(prefix))
    logger = logging.getLogger("dtr_scale")
    # Replaced, not added: a second call must not make every line come twice.
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # A library may put a handler on the root logger, which would print each line again.
    logger.propagate = False


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        time = self.formatTime(record, self.datefmt)
        return f"{time} {self._prefix}{level}{record.getMessage()}"


class ProgressBar:
    """Shows how far long work is: a bar on a terminal, elsewhere a line every half a minute.

    `shown` is whether this process speaks, as rank 0 does for the others.
    """

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self._what = what
        self._total = total
        self._shown = shown
        self._done = 0
        self._start = self._told_at = time.monotonic()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} eta {remaining}"
            self._bar = tqdm(
                total=total,
                desc=what,
                bar_format=layout,
                leave=False,
                ncols=columns(),
                nrows=24,  # in a terminal of no known size tqdm would find no row to draw in
                miniters=1,
            )

    def advance(self, count: int = 1) -> None:
        """Count what is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._shown and now - self._told_at >= _LINE_SECONDS:
            self._told_at = now
            left = (now - self._start) * (self._total - self._done) / max(1, self._done)
            log.info("%s: %d of %d, eta %s", self._what, self._done, self._total, duration(left))

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Take the bar away while something is printed."""
        with self._bar.external_write_mode() if self._bar else nullcontext():
            yield

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def watched(
    items: Iterable[_Item], what: str, total: int, *, shown: bool = True
) -> Iterator[_Item]:
    """Yield items, and show how far it is."""
    with ProgressBar(what, total, shown=shown) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def telling(what: str, seconds: float = 5.0) -> Iterator[None]:
    """Say once what is being done, if it takes longer: most of the time it does not."""
    timer = threading.Timer(seconds, _say, (f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(message: str) -> None:
    # Not `log.info`: whoever loads a network silences all logging meanwhile, to spare the user what
    # libraries tell of it.
    if log.getEffectiveLevel() <= logging.INFO:
        log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, message, (), None))


def columns() -> int:
    """Return how many columns of the terminal on stderr can be filled.

    One stays free: some terminals wrap a full line.
    """
    try:
        found = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        found = 0
    return (found or _COLUMNS) - 1


def duration(seconds: float) -> str:
    """Return a duration in hours, minutes and seconds, or in days and hours.

    >>> duration(12_345.6), duration(200_000)
    ('3:25:46', '2d 7h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}d {hours % 24}h" if hours >= 48 else f"{hours}:{minutes:02}:{rest:02}"
