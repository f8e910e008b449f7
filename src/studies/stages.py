"""Plan the stages of a study: what is trained and evaluated, and what each waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from unlora.cli.compose import composed
from unlora.errors import InputError
from unlora.studies.config import Study

Role = Literal["target", "gold", "method", "request"]


@dataclass(frozen=True)
class Stage:
    """One training, evaluation, audit, or scaling of an adapter.

    Attributes:
        run: what the table calls it.
        role: ``request`` for what answers a deletion request.
        seed: None for a model that was there already.
        folder: the run folder; of an evaluation of a model that was there already, its own.
        config: the primary config, ``train`` or ``unlearn``.
        params: of a search: key of the config -> value, over what the overrides say; of an audit
            or a dial, what it is told.
        model: that training starts from, or that is evaluated; None: as the config says.
        retain_log, target_log: folders with the logs that figures are compared with.
        needs: names of the stages that must be finished before.
        again: a run folder whose training is repeated with its own settings; ``params`` are
            sections of its config that are others now.
    """

    kind: Literal["train", "eval", "audit", "dial"]
    run: str
    role: Role
    seed: int | None
    folder: str
    config: str
    overrides: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    retain_log: str | None = None
    target_log: str | None = None
    needs: tuple[str, ...] = ()
    again: str | None = None

    @property
    def name(self) -> str:
        """``seed0-NPO-train``, which also names its files."""
        seed = "given" if self.seed is None else f"seed{self.seed}"
        return f"{seed}-{self.run}-{self.kind}"

    @property
    def title(self) -> str:
        """For people."""
        seed = "" if self.seed is None else f" (seed {self.seed})"
        return f"{'evaluate' if self.kind == 'eval' else self.kind} {self.run}{seed}"

    @property
    def evals(self) -> str:
        """The folder of the logs of this run."""
        return str(Path(self.folder) / "evals")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Stage":
        """What :meth:`as_dict` made."""
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {name: content[name] for name in names if name in content}
        for name in ("overrides", "needs"):
            values[name] = tuple(values[name])
        return cls(**values)


def plan(study: Study, folder: Path) -> list[Stage]:
    """All stages, each after those it needs.

    Raises:
        InputError: two methods would have one name.
    """
    stages: list[Stage] = []
    for seed in study.seeds:
        home = folder / f"seed{seed}"
        models, gold, target = references(study, folder, home, seed)
        stages += [stage for stage in models if stage not in stages]
        for method, overrides in variants(study.methods).items():
            stages += unlearning(study, home / method, method, overrides, seed, target, gold)
    return stages


def references(
    study: Study, folder: Path, home: Path, seed: int
) -> tuple[list[Stage], Stage | None, Stage]:
    """The stages of gold and target for one seed, and the evaluation of each."""
    gold_stages = _model(study, "gold", folder, home, seed, None)
    gold = gold_stages[-1] if gold_stages else None
    target_stages = _model(study, "target", folder, home, seed, gold)
    return [*gold_stages, *target_stages], gold, target_stages[-1]


def unlearning(
    study: Study,
    folder: Path,
    method: str,
    overrides: Sequence[str],
    seed: int,
    target: Stage,
    gold: Stage | None,
    params: Mapping[str, Any] | None = None,
) -> list[Stage]:
    """Training and evaluation of one method; ``target`` and ``gold`` are evaluations."""
    words = (*study.unlearn, *overrides)
    panels = _has_panels("unlearn", words)
    trained = [name for name in target.needs if name == target.name.replace("-eval", "-train")]
    train = Stage(
        "train", method, "method", seed, str(folder), "unlearn", words, dict(params or {}),
        model=target.model,
        retain_log=gold.evals if gold and panels else None,
        needs=(*trained, *((gold.name,) if gold and panels else ())),
    )  # fmt: skip
    return [train, evaluation(study, train, gold, target)]


def variants(methods: Mapping[str, Sequence[str] | None]) -> dict[str, tuple[str, ...]]:
    """Each method; one with several values for a key (``key=1,2``) is one method for each.

    Raises:
        InputError: an override cannot be read, or two methods would have one name.
    """
    variants_of: dict[str, tuple[str, ...]] = {}
    for method, overrides in methods.items():
        for words, several in _expanded(overrides or ()):
            name = ",".join([method, *(f"{k.rpartition('.')[2]}={v}" for k, v in several)])
            name = name.replace("/", "_").replace("'", "").replace('"', "")
            if len(name.encode()) > 200:
                raise InputError(
                    f"The method {name!r} has too long a name for a folder; shorten it."
                )
            if name in variants_of:
                raise InputError(f"Two methods of the study would be called {name!r}; rename one.")
            variants_of[name] = tuple(words)
    return variants_of


def _expanded(overrides: Sequence[str]) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Every combination: all overrides, and those of them with several values to choose from."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    expanded: list[tuple[list[str], list[tuple[str, str]]]] = [([], [])]
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word.removeprefix("@"))
        except HydraException as error:
            raise InputError(f"The study has an override that cannot be read: {word!r}.") from error
        if not override.is_sweep_override():
            expanded = [([*words, word], several) for words, several in expanded]
            continue
        key = override.key_or_group
        values = list(override.sweep_string_iterator())
        expanded = [
            ([*words, f"{key}={value}"], [*several, (key, value)])
            for words, several in expanded
            for value in values
        ]
    return expanded


def _model(
    study: Study, role: Role, folder: Path, home: Path, seed: int, gold: Stage | None
) -> list[Stage]:
    """Training and evaluation of target or gold, or the evaluation of one that is there."""
    declared = getattr(study, role)
    if declared is None:
        return []
    if isinstance(declared, str):
        # its figures depend on the seed where those of the gold model that it is compared with do
        own = seed if gold is not None and gold.seed is not None else None
        home_of = folder if own is None else home
        there = Stage("eval", role, role, own, str(home_of / role), "unlearn", tuple(study.unlearn),
                      model=declared)  # fmt: skip
        return [evaluation(study, there, gold, None)]
    words = tuple(declared)
    panels = _has_panels("train", words) and gold is not None
    train = Stage(
        "train", role, role, seed, str(home / role), "train", words,
        retain_log=gold.evals if gold and panels else None,
        needs=(gold.name,) if gold and panels else (),
    )  # fmt: skip
    return [train, evaluation(study, train, gold, None)]


def evaluation(study: Study, of: Stage, gold: Stage | None, target: Stage | None) -> Stage:
    """The evaluation of what a stage leaves, or of a model that is there already."""
    trained = (of.name,) if of.kind in ("train", "dial") else ()
    compared = [stage for stage in (gold, target) if stage is not None]
    return Stage(
        "eval", of.run, of.role, of.seed, of.folder, "unlearn", tuple(study.unlearn),
        model=of.folder if trained else of.model,
        retain_log=gold.evals if gold else None,
        target_log=target.evals if target else None,
        needs=(*(stage.name for stage in compared), *trained),
    )  # fmt: skip


def _has_panels(config: str, overrides: tuple[str, ...]) -> bool:
    """Whether a training evaluates while it runs, and so needs the logs it compares with."""
    args = composed(config, overrides).trainer.args
    return str(args.get("eval_strategy", "no")) != "no" or bool(args.get("eval_on_start"))
