"""What can go wrong, each with the exit code of the command line.

0 passed, 1 a check failed, 2 bad usage or bad input, 3 this environment cannot do it, 4 inconclusive.
"""

import errno


class R1ExportError(Exception):
    """Root of all errors that r1export raises on purpose; printed as one line, without a traceback.

    `message` says what was found and what was expected, `remedy` what to do next.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class InputError(R1ExportError):
    """A recipe, a file, a folder or an argument is not what it has to be."""

    exit_code = 2


class CheckFailed(R1ExportError):
    """A check did not hold."""

    exit_code = 1


class Unsupported(R1ExportError):
    """This model, machine or installation cannot do what was asked."""

    exit_code = 3


class Inconclusive(R1ExportError):
    """A check could be neither passed nor failed with the evidence at hand."""

    exit_code = 4


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, at most `limit` characters of it, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


_ALLOCATION = ("can't allocate memory", "not enough memory", "failed to allocate memory", "bad allocation", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, torch or onnxruntime, which have no common error for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION)


NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}


def refused(error: OSError, what: str = "") -> R1ExportError:
    """What the operating system refused, by default with its place: a path that is not what it has to be, else the environment."""
    message = f"{what or error.filename or 'a file'}: {error.strerror or error}"
    if error.errno in NOT_THERE:
        return InputError(message, "check the path")
    return Unsupported(message, "check disk space and permissions; existing files were not modified")
