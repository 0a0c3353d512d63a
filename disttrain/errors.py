"""The errors a user can cause or meet, each with its exit code.

A `DisttrainError` is shown as one line without a traceback: it must say what happened, where, and what
to do. Any other exception is a bug of ours (exit 1) and is shown with its traceback.
"""


class DisttrainError(Exception):
    """A failure with a message for the user; subclasses give the exit code."""

    exit_code = 1


class UsageError(DisttrainError):
    """A wrong command line or configuration."""

    exit_code = 2


class DataError(DisttrainError):
    """A data set is missing, damaged or not what its index says."""

    exit_code = 65


class CheckpointError(DisttrainError):
    """A checkpoint is missing, damaged or does not fit the run."""

    exit_code = 66


class TrainingError(DisttrainError):
    """A rank died or the loss is not finite."""

    exit_code = 70


class HangError(DisttrainError):
    """A rank makes no progress, or a rank or node did not come."""

    exit_code = 71


class BusyError(DisttrainError):
    """A port or run folder is taken, foreign or not writable."""

    exit_code = 73


class StorageError(DisttrainError):
    """The disk is full or a write failed."""

    exit_code = 74


class StoppedError(DisttrainError):
    """The run was asked to stop; it saved a checkpoint and can be resumed."""

    exit_code = 75


class UnsafeError(DisttrainError):
    """Something hostile was refused: a command, a pickle, a link, a path that leaves its folder, a bomb."""

    exit_code = 77


def error_of(exit_code: int, message: str) -> DisttrainError:
    """Returns the error that another process ended with."""
    kinds = {kind.exit_code: kind for kind in DisttrainError.__subclasses__()}
    return kinds.get(exit_code, DisttrainError)(message)


def describe(error: BaseException) -> str:
    """Returns the type of an error of somebody else's code, and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def reason(error: BaseException) -> str:
    """Returns why an operation failed, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
