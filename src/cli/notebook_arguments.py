"""Check what a notebook gives to the functions of ``unlora.api``, before anything is loaded."""

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.errors import InputError

FOLDER: Any = ((str, Path), "a folder")
NUMBER: Any = ((numbers.Real, type(None)), "a number")
# argument -> what it may be
ARGUMENTS: dict[str, tuple[tuple[type, ...], str]] = {
    "question": ((str,), "text"),
    "max_new_tokens": ((numbers.Integral,), "a whole number"),
    "method": ((str,), "the name of a method, such as 'NPO'"),
    "output_dir": FOLDER,
    "output": FOLDER,
    "lora": ((bool, Mapping), "True, False, or keys of model.lora_config with their values"),
    "epochs": NUMBER,
    "learning_rate": NUMBER,
    "batch_size": ((numbers.Integral, type(None)), "a whole number"),
    "merged": ((bool,), "True or False"),
    "overrides": ((list, tuple), "a list of words such as 'trainer.args.seed=1'"),
}


def check_arguments(**parts: Any) -> None:
    """Raises InputError where an argument is of another kind than it may be."""
    for name, value in parts.items():
        kinds, wanted = ARGUMENTS[name]
        number = isinstance(value, bool) and bool not in kinds  # which True is, too
        if not isinstance(value, kinds) or number:
            raise InputError(f"{name} is {value!r}; it must be {wanted}.")
        words: Any = value if name == "overrides" else ()
        if not all(isinstance(word, str) for word in words):
            raise InputError(f"{name} is {value!r}; it must be {wanted}.")
