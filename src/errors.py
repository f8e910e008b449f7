"""The one exception for what a user can put right."""


class InputError(ValueError):
    """What was given, what is allowed, what to do: one clear message, shown without a traceback.

    The entry points print it and leave with exit code 2.
    """
