"""Run multiple-choice benchmarks (WMDP, MMLU) through lm-evaluation-harness, an optional package.

The harness knows the tasks: data, prompts, choices, accuracy. The model is asked by our own pass,
its adapter unmerged: shared out over the processes of a run, halved when memory runs out, and with
the vocabulary computed at the scored tokens only. What it answers is kept as that of other passes.
"""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from unlora.data.cache import cache_folder
from unlora.data.template import Template
from unlora.errors import InputError
from unlora.evals.eval_model import LazyModel
from unlora.evals.harness_model import HarnessModel, Planned
from unlora.evals.harness_silence import in_silence
from unlora.evals.harness_tasks import Tasks, load_tasks
from unlora.evals.passes.batching import rank_and_size
from unlora.evals.progress import Bar
from unlora.evals.result_cache import ResultCache
from unlora.registry import unknown
from unlora.results.eval_log import write_log
from unlora.results.value import Value
from unlora.runs.atomic_files import is_main_process

HANDLER, KIND = "LMEvalEvaluator", "LMEval"
KEYS = ("handler", "output_dir", "overwrite", "cache", "tasks", "simple_evaluate_args")
ARGS = (
    "batch_size", "include_path", "num_fewshot", "limit", "samples", "bootstrap_iters",
    "system_instruction", "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs",
    "cache_requests", "rewrite_requests_cache", "delete_requests_cache", "check_integrity",
    "write_out", "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed",
    "confirm_run_unsafe_code", "metadata",
)  # fmt: skip
NOT_INSTALLED = "lm-eval is not installed. Run: pip install 'unlora[lm-eval]'"
NORMAL_95 = 1.959963984540054  # 95 % of a normal distribution is within so many standard errors
logger = logging.getLogger(__name__)


def check_harness(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that the harness could not run.

    Raises:
        InputError: everything that is wrong, in one message.
    """
    args = config.get("simple_evaluate_args") or {}
    wrong = [unknown(f"key of eval.{name}", key, KEYS) for key in config if key not in KEYS]
    tasks = config.get("tasks")
    if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
        wrong.append(f"eval.{name}.tasks must be a list of tasks, e.g. [wmdp_cyber, mmlu].")
    elif others := [task for task in tasks if not isinstance(task, str)]:
        wrong.append(f"eval.{name}.tasks holds {others[0]!r}; a task is given by its name.")
    for key in args:
        if key == "use_cache":
            wrong.append(
                f"eval.{name}.simple_evaluate_args.use_cache keeps answers by question alone, and "
                "would give one model those of another. Leave it out."
            )
        elif key not in ARGS:
            wrong.append(unknown(f"key of eval.{name}.simple_evaluate_args", key, ARGS))
    size = args.get("batch_size")
    if size not in (None, "auto") and (type(size) is not int or size < 1):
        wrong.append(
            f"eval.{name}.simple_evaluate_args.batch_size is {size!r}; it must be a number above "
            "0, or auto."
        )
    for folder in _folders(config):
        if not Path(folder).is_dir():
            wrong.append(
                f"eval.{name}.simple_evaluate_args.include_path: there is no folder {folder!r}."
            )
    if wrong:
        raise InputError("\n".join(wrong))


class HarnessSuite:
    """Tasks of the harness, found and their data read here, before there is a model."""

    kind = KIND

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
        self.batch_size = (config.get("simple_evaluate_args") or {}).get("batch_size")
        self.args = self._simple_evaluate_args(template_args)
        self.template_args: Mapping[str, Any] = {}
        if self.args["apply_chat_template"]:
            template = Template(tokenizer, {**template_args, "apply_chat_template": True})
            self.template_args = template.variables
            if template.own_prompt_opens_thought:
                raise InputError(
                    f"eval.{name}: the chat template opens a thought, in which lm-eval would score "
                    "its choices. Set model.template_args.chat_template_kwargs.enable_thinking="
                    f"false if it knows that, or eval.{name}.simple_evaluate_args."
                    "apply_chat_template=false."
                )
        self.missing = _why_unusable()
        self.tasks: Tasks | None = None
        if self.missing:
            logger.warning("%s: nothing will be computed: %s", name, self.missing)
        else:
            trusted = bool(self.args.get("confirm_run_unsafe_code"))
            folders = _folders(config)
            self.tasks = load_tasks(name, config["tasks"], folders, run_code=trusted)

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
        return {f"{task}/acc": self.missing for task in self.config["tasks"] if self.missing}

    def not_computable_for(self, subject: LazyModel | None) -> dict[str, str]:
        """The same: no model makes a difference."""
        return self.not_computable

    def plan(self, model: nn.Module | LazyModel) -> list[dict[str, Any]]:
        """What an evaluation would ask the model: pass, task, requests, tokens, whether it is kept.

        Nothing is asked. The requests are made, which takes a while where the tasks are large.
        """
        if self.tasks is None:
            return []
        asker = self._asker(LazyModel.of(model), Bar(quiet=True))

        def stop(request: str, instances: Sequence[Any]) -> list[Any]:
            raise Planned

        asker.answer_with(stop)
        with suppress(Planned):
            self._run(asker, self.tasks)
        known = self.tasks.manager.load(self.tasks.asked)["tasks"].values()
        return asker.plan([request for task in known for request in task.instances])

    def evaluate(
        self,
        model: nn.Module | LazyModel,
        output_dir: str | Path | None = None,
        *,
        panel: bool = False,
        also: Sequence[str] = (),
        bar: Bar | None = None,
    ) -> dict[str, float]:
        """Accuracy of each task and group, as ``<task>/acc``; nothing in a panel.

        NaN where the model's logits were not finite on a question: lm-eval alone would take the
        first choice there, and so report chance.
        """
        if panel:
            return {}
        if output_dir is not None:
            log = Path(output_dir) / f"{KIND}_EVAL.json"
            if not self.config.get("overwrite", True) and log.exists():
                raise InputError(f"{log} is there. Set eval.{self.name}.overwrite=true.")
        values = {name: Value.missing(why) for name, why in self.not_computable.items()}
        if self.tasks:
            with bar or Bar() as shown:
                values = self._values(LazyModel.of(model), self.tasks, shown)
        for name, value in values.items():
            if value.not_scored:
                logger.warning("%s: %s has no value: %s", self.name, name, value.not_scored)
        if output_dir is not None and is_main_process():
            write_log(Path(output_dir), KIND, values)
        return {name: value.value for name, value in values.items() if not value.not_computed}

    def _simple_evaluate_args(self, template_args: Mapping[str, Any]) -> dict[str, Any]:
        """What lm-eval's ``simple_evaluate`` is told; what is null is as the model's template."""
        args = dict(self.config.get("simple_evaluate_args") or {})
        for ours in ("batch_size", "include_path"):
            args.pop(ours, None)
        if args.get("apply_chat_template") is None:
            args["apply_chat_template"] = bool(template_args.get("apply_chat_template"))
        if args["apply_chat_template"] and not self.tokenizer.chat_template:
            raise InputError(
                f"eval.{self.name}: apply_chat_template is true, but the tokenizer "
                f"{self.tokenizer.name_or_path!r} has no chat template. Set eval.{self.name}."
                "simple_evaluate_args.apply_chat_template=false."
            )
        if args["apply_chat_template"] and args.get("system_instruction") is None:
            args["system_instruction"] = template_args.get("system_prompt")
        return args

    def _asker(self, subject: LazyModel, bar: Bar) -> HarnessModel:
        seeds = [self.args.get(key) for key in ("torch_random_seed", "gen_kwargs")]
        return HarnessModel(
            subject, self.tokenizer,
            ResultCache(cache_folder() / "answers" if self.config.get("cache", True) else None),
            batch_size=self.batch_size, drawing=seeds, kind=KIND, bar=bar,
            template_args=self.template_args,
        )  # fmt: skip

    def _run(self, asker: HarnessModel, tasks: Tasks) -> dict[str, Any] | None:
        """What lm-eval makes of the answers; None in all processes of a machine but the first."""
        from lm_eval import simple_evaluate

        with in_silence(), asker.random_state:
            return simple_evaluate(
                model=asker.lm,
                tasks=tasks.asked,
                task_manager=tasks.manager,
                log_samples=True,
                **self.args,
            )

    def _values(self, subject: LazyModel, tasks: Tasks, bar: Bar) -> dict[str, Value]:
        results = self._run(self._asker(subject, bar), tasks)
        # every process has asked, but only the first of each machine is told the result
        values = [values_of(results) if results else None]
        if rank_and_size()[1] > 1:
            dist.broadcast_object_list(values, src=0)
        assert values[0] is not None
        return values[0]


def values_of(results: Mapping[str, Any]) -> dict[str, Value]:
    """``acc,none`` of a task or group, as lm-eval gives it -> ``<task>/acc``."""
    values = {}
    dead = _dead(results)
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        for key, number in numbers.items():
            metric, _, filter_name = key.partition(",")
            if (
                not filter_name
                or metric.endswith("_stderr")
                or not isinstance(number, (int, float))
            ):
                continue
            name = f"{task}/{metric}" if filter_name == "none" else f"{task}/{metric},{filter_name}"
            note = f"{numbers['sample_len']} questions" if "sample_len" in numbers else None
            if dead[task]:
                values[name] = Value(float("nan"), unscored=dead[task], note=note)
            else:
                interval = _interval(metric, number, numbers.get(f"{metric}_stderr,{filter_name}"))
                values[name] = Value(float(number), interval=interval, note=note)
    return values


def _dead(results: Mapping[str, Any]) -> dict[str, int]:
    """Of each task and group, on how many questions a log-likelihood is not finite."""
    of_task = {
        task: {
            sample["doc_id"]
            for sample in samples
            if not all(map(_is_finite, sample["filtered_resps"]))
        }
        for task, samples in results.get("samples", {}).items()
    }

    def count(name: str) -> int:
        members = results.get("group_subtasks", {}).get(name, ())
        return len(of_task.get(name, ())) + sum(map(count, members))

    return {name: count(name) for name in {**results["results"], **results.get("groups", {})}}


def _is_finite(response: Any) -> bool:
    """A log-likelihood comes with whether it is the greedy answer; text is always there."""
    number = response[0] if isinstance(response, (tuple, list)) and response else response
    return not isinstance(number, float) or math.isfinite(number)


def _interval(metric: str, value: float, error: Any) -> tuple[float, float] | None:
    """95 % interval from a standard error; lm-eval writes N/A where there is none."""
    if not isinstance(error, (int, float)) or not math.isfinite(error):
        return None
    low, high = value - NORMAL_95 * error, value + NORMAL_95 * error
    return (max(0.0, low), min(1.0, high)) if metric.startswith("acc") else (low, high)


def _folders(config: Mapping[str, Any]) -> list[str]:
    folders = (config.get("simple_evaluate_args") or {}).get("include_path") or []
    return (
        [str(folders)] if isinstance(folders, (str, Path)) else [str(folder) for folder in folders]
    )


def _why_unusable() -> str | None:
    """Why the package cannot be used, where that is so."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        if importlib.util.find_spec("lm_eval") is None:
            return NOT_INSTALLED
        return f"lm-eval cannot be imported: {error}"
    return None
