"""unlora: LoRA-first unlearning for language models.

In a notebook: ``from unlora import load, unlearn, evaluate, export``, see ``docs/api.md``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlora.api import Evaluation, Model, Unlearned, evaluate, export, load, unlearn
    from unlora.results.run_result import RunResult, read_run

__all__ = [
    "Evaluation", "Model", "RunResult", "Unlearned", "evaluate", "export", "load", "read_run",
    "unlearn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # the command line must not wait for what a notebook needs
    if name in ("RunResult", "read_run"):
        from unlora.results import run_result

        return getattr(run_result, name)
    if name in __all__:
        from unlora import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
