"""Keep the random numbers of a library that seeds apart from those of the run around it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStateApart:
    """Within, another may seed; afterwards the random state is what it was before."""

    def __enter__(self) -> "RandomStateApart":
        self.outer = _now()
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self.outer)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """For a while the state from before again, which goes on from here."""
        inner = _now()
        _restore(self.outer)
        try:
            yield
        finally:
            self.outer = _now()
            _restore(inner)


def _now() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _restore(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, devices = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices:
        torch.cuda.set_rng_state_all(devices)
