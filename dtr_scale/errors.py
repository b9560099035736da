"""Define the errors of this package, as one tree.

DtrScaleError
├── ConfigError       an experiment file, an override or a combination of settings
├── DataError         a manifest, a shard or a sample
├── CheckpointError   a checkpoint that cannot be written, found or trusted
│   ├── DamagedCheckpointError
│   └── UnsavedError
├── EngineError       devices, launchers, DeepSpeed
│   ├── DivergenceError
│   └── PeerError
├── EvaluationError   sampling and metrics
│   └── UnfinishedError
└── TrackingError     MLflow, where a command is there for it alone

Every message says what, where, the value, what is accepted and the fix, in a line per mistake.
The command line prints it without a traceback and exits with the error's `exit_code`.
"""


class DtrScaleError(Exception):
    """Root of the errors that a user can act on."""

    exit_code = 2
    """2: to be mended before it is started again; 1: it failed, and may do better next time."""

    on_every_rank = False
    """All ranks raise it together, so rank 0 alone reports it."""

    reported = False
    """The rank that failed reports it; this one is only told."""


class ConfigError(DtrScaleError):
    """The experiment cannot be run as it is described."""

    on_every_rank = True


class DataError(DtrScaleError):
    """The data is not what its manifest says."""


class CheckpointError(DtrScaleError):
    """A checkpoint cannot be written, found or trusted."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete, cut or altered: another one may be whole."""


class UnsavedError(CheckpointError):
    """Too many saves failed in a row, or the outcome of a run cannot be written."""

    exit_code = 1


class EngineError(DtrScaleError):
    """The network cannot be run on these devices in this way."""


class DivergenceError(EngineError):
    """The loss or its gradient is no number any more."""

    exit_code = 1
    on_every_rank = True


class PeerError(EngineError):
    """Another rank has failed, or is gone; this one cannot go on without it."""

    exit_code = 1


class EvaluationError(DtrScaleError):
    """Samples or metrics cannot be computed."""


class UnfinishedError(EvaluationError):
    """A job was asked to leave before its end, for the reason given; the same command goes on."""

    exit_code = 75
    on_every_rank = True
    reported = True


class TrackingError(DtrScaleError):
    """MLflow does not answer a command that is there for it alone."""

    exit_code = 1


def failure_reason(error: BaseException) -> str:
    """Return an error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__
