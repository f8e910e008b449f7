"""Multiple-choice benchmarks (WMDP, MMLU) through lm-evaluation-harness, an optional package."""

import importlib.util
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from unlora.errors import InputError
from unlora.evals.logs import write_log
from unlora.evals.records import Value
from unlora.registry import unknown
from unlora.run import is_main_process

HANDLER, KIND = "LMEvalEvaluator", "LMEval"
KEYS = ("handler", "output_dir", "overwrite", "tasks", "simple_evaluate_args")
NOT_INSTALLED = "lm-eval is not installed. Run: pip install 'unlora[lm-eval]'"
logger = logging.getLogger(__name__)


def check_harness(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that the harness could not run.

    Raises:
        InputError: an unknown key, or no tasks.
    """
    for key in config:
        if key not in KEYS:
            raise InputError(unknown(f"key of eval.{name}", key, KEYS))
    if not config.get("tasks") or isinstance(config["tasks"], str):
        raise InputError(f"eval.{name}.tasks must be a list of tasks, e.g. [wmdp_cyber, mmlu].")


class HarnessSuite:
    """Tasks of the harness. The model is handed over as it is, adapter unmerged."""

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any],
    ):
        check_harness(name, config)
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.uses_template = bool(template_args.get("apply_chat_template"))
        for metric, why in self.not_computable.items():
            logger.warning("%s: %s will not be computed: %s", name, metric, why)

    @property
    def output_dir(self) -> Path:
        """Where the config wants the log."""
        return Path(self.config["output_dir"])

    @property
    def metrics(self) -> dict[str, bool]:
        """The metrics that may choose a checkpoint: none, they take too long."""
        return {}

    @property
    def not_computable(self) -> dict[str, str]:
        """The metrics that will have no value, whatever the model says -> why."""
        if importlib.util.find_spec("lm_eval"):
            return {}
        return {f"{task}/acc": NOT_INSTALLED for task in self.config["tasks"]}

    def evaluate(
        self,
        model: nn.Module,
        output_dir: str | Path | None = None,
        *,
        panel: bool = False,
        also: Sequence[str] = (),
    ) -> dict[str, float]:
        """Accuracy of each task, as ``<task>/acc``; nothing in a panel."""
        if panel:
            return {}
        if output_dir is not None:
            log = Path(output_dir) / f"{KIND}_EVAL.json"
            if not self.config.get("overwrite", True) and log.exists():
                raise InputError(f"{log} is there. Set eval.{self.name}.overwrite=true.")
        values = self._values(model)
        for name, value in values.items():
            if value.not_computed:
                logger.warning("%s: %s is not computed: %s", self.name, name, value.not_computed)
        if output_dir is not None and is_main_process():
            write_log(Path(output_dir), KIND, values)
        return {name: value.value for name, value in values.items() if not value.not_computed}

    def _values(self, model: nn.Module) -> dict[str, Value]:
        tasks = list(self.config["tasks"])
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "lm_eval"
            reason = NOT_INSTALLED if missing else f"lm-eval cannot be imported: {error}"
            return {f"{task}/acc": Value.missing(reason) for task in tasks}
        args = dict(self.config.get("simple_evaluate_args") or {})
        batch_size = args.pop("batch_size", 16)
        folder = args.pop("include_path", None)
        if args.get("apply_chat_template") is None:
            args["apply_chat_template"] = self.uses_template
        with _as_before(model):
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=batch_size),
                tasks=tasks,
                task_manager=TaskManager(include_path=folder),
                log_samples=False,
                **args,
            )
        return _read(found)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards modes and random state are what they were; the harness seeds and evaluates."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _read(found: Mapping[str, Any]) -> dict[str, Value]:
    """``acc,none`` of a task or group -> ``<task>/acc``."""
    values = {}
    for task, numbers in {**found["results"], **found.get("groups", {})}.items():
        for key, number in numbers.items():
            name, _, filtered = key.partition(",")
            is_number = isinstance(number, (int, float)) and not name.endswith("_stderr")
            if filtered and is_number and math.isfinite(number):
                suffix = "" if filtered == "none" else f",{filtered}"
                values[f"{task}/{name}{suffix}"] = Value(float(number))
    return values
