"""Set up logging: all of rank 0, warnings of the other ranks; leave passwords out of URLs."""

import logging
import re
import sys

from tqdm import tqdm

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
