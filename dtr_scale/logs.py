"""Logging: rank 0 tells the story, the other ranks speak up when something is wrong."""

import logging
import sys
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm


def without_password(url: str) -> str:
    """Return a URL as it may be shown and stored: user and password left out."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class _BesideProgressBar(logging.Handler):
    """Writes to stderr without tearing a progress bar apart."""

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
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        time = self.formatTime(record, self.datefmt)
        return f"{time} {self._prefix}{level}{record.getMessage()}"
