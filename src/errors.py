"""End a run in words and not in a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# what is wrong with a path or a disk, and no fault of the program
OF_THE_SYSTEM = {
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOTDIR,
    errno.ENXIO, errno.EPERM, errno.EROFS,
}  # fmt: skip
LONGEST_PATH = 200  # letters of a sentence


class InputError(ValueError):
    """What was given, what is allowed, what to do: one clear message, shown without a traceback.

    The entry points print it and leave with exit code 2.
    """


class GuardError(RuntimeError):
    """A guard found the run to be silently wrong; its message says what it saw.

    The entry points print it and leave with exit code 1.
    """


def shortened(path: object) -> str:
    """A path as a sentence shows it."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH else f"{text[:LONGEST_PATH]}..."


@contextmanager
def system_in_words() -> Iterator[None]:
    """Say in one sentence what the system has against a path.

    Raises:
        InputError: it cannot be used: too long, read-only, no folder, not allowed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        raise InputError(
            f"{shortened(error.filename)!r} cannot be used: {error.strerror}. Give another path."
        ) from error
    except ValueError as error:
        if not str(error).startswith("embedded null"):
            raise
        raise InputError("A path holds a null byte, which no path may. Give another.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or Python say that memory ran out, on whatever device."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("not enough memory", "out of memory")
    return known or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
