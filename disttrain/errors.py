"""The errors that users see, each with its exit code.

A `DisttrainError` is shown as one line without a traceback, so it must say what happened, where, and what
to do. Any other exception is a bug in disttrain: it is shown with its traceback, and the exit code is 1.
"""


class DisttrainError(Exception):
    """A failure with a message for the user; subclasses give the exit code."""

    exit_code = 1


class UsageError(DisttrainError):
    """A wrong command line or configuration."""

    exit_code = 2


class DataError(DisttrainError):
    """A data set is missing, damaged or does not match its index."""

    exit_code = 65


class CheckpointError(DisttrainError):
    """A checkpoint is missing, damaged or does not fit the run."""

    exit_code = 66


class TrainingError(DisttrainError):
    """A rank died or the loss is not finite."""

    exit_code = 70


class HangError(DisttrainError):
    """A rank makes no progress, or a rank or node did not join."""

    exit_code = 71


class BusyError(DisttrainError):
    """A port is in use, or a run folder is in use, not a run or not writable."""

    exit_code = 73


class StorageError(DisttrainError):
    """The disk is full or a write failed."""

    exit_code = 74


class StoppedError(DisttrainError):
    """The run was asked to stop; it saved a checkpoint and can be resumed."""

    exit_code = 75


class UnsafeError(DisttrainError):
    """Unsafe input was refused: a command, pickle, link, decompression bomb or path outside its folder."""

    exit_code = 77


def error_of(exit_code: int, message: str) -> DisttrainError:
    """Returns the error that stands for the exit code of another process."""
    kinds = {kind.exit_code: kind for kind in DisttrainError.__subclasses__()}
    return kinds.get(exit_code, DisttrainError)(message)


def error_text(error: BaseException) -> str:
    """Returns the type and message of an exception, for errors raised by other people's code."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def reason(error: BaseException) -> str:
    """Returns why an operation failed, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
