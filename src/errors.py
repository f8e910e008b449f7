"""The exceptions that end a run in words and not in a traceback."""


class InputError(ValueError):
    """What was given, what is allowed, what to do: one clear message, shown without a traceback.

    The entry points print it and leave with exit code 2.
    """


class GuardError(RuntimeError):
    """A guard found the run to be silently wrong; its message says what it saw.

    The entry points print it and leave with exit code 1.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or Python say that memory ran out, on whatever device."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("not enough memory", "out of memory")
    return known or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
