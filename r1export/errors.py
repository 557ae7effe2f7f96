"""The exceptions of r1export, each with its exit code.

0 passed, 1 a check failed, 2 bad usage or bad input, 3 not supported by this environment, 4 inconclusive.
"""

import errno


class R1ExportError(Exception):
    """Base class of all errors that r1export raises on purpose. Printed as one line, without a traceback.

    `message` says what was found and what was expected, `remedy` how to fix it.
    """

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class InputError(R1ExportError):
    """A recipe, a file, a folder or an argument is invalid."""

    exit_code = 2


class CheckFailed(R1ExportError):
    """A check failed."""

    exit_code = 1


class Unsupported(R1ExportError):
    """This model, machine or installation doesn't support the request."""

    exit_code = 3


class Inconclusive(R1ExportError):
    """The evidence is not enough to pass or fail a check."""

    exit_code = 4


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, cut to `limit` characters; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


_ALLOCATION = ("can't allocate memory", "not enough memory", "failed to allocate memory", "bad allocation", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Python, torch and onnxruntime have no common exception for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION)


NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}


def refused(error: OSError, what: str = "") -> R1ExportError:
    """An OSError as an InputError if the path is wrong, else as Unsupported. `what` replaces the path in the message."""
    message = f"{what or error.filename or 'a file'}: {error.strerror or error}"
    if error.errno in NOT_THERE:
        return InputError(message, "check the path")
    return Unsupported(message, "check disk space and permissions; existing files were not modified")
