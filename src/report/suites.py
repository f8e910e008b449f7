"""Know each benchmark: which figures come first, and which end is better."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unlora.results.collapse import CollapseRule
from unlora.results.target_check import FORGET_FIGURES

Aim = Literal["gold", "high", "low", "zero"]
AIM_WORDS: Mapping[Aim | None, str] = {
    "gold": "nearest gold is best",
    "high": "higher is better",
    "low": "lower is better",
    "zero": "nearest 0 is best",
    None: "neither end is better",
}


@dataclass(frozen=True)
class Suite:
    """The figures of one kind of log.

    Attributes:
        main: metric -> heading, those that come first.
        forget: the figures by which the way from target to gold is measured.
        utility: what the model should still be able to do, 0..1.
        repetition: share of repetition in what it writes about data to be kept.
        rule: when a run is collapsed, where its config does not say; its ``chance`` is what
            guessing reaches in utility and forget figures.
        forget_repetition, fluency: of what it writes about data to be forgotten.
    """

    title: str
    main: Mapping[str, str]
    forget: tuple[str, ...]
    utility: str
    repetition: str = ""
    rule: CollapseRule = CollapseRule()
    forget_repetition: str = "forget_repetition"
    fluency: str = "forget_fluency"


LEAKAGE = "forget_leakage"
_OF_QUESTIONS = {
    "forget_Q_A_Prob": "forget prob",
    "forget_Q_A_ROUGE": "forget ROUGE",
    "extraction_strength": "extraction",
    "mia_min_k": "min-k AUC",
    "forget_quality": "forget quality",
    "privleak": "privleak",
    "retain_Q_A_Prob": "retain prob",
}
_TOFU = {**_OF_QUESTIONS, "model_utility": "utility"}
SUITES: Mapping[str, Suite] = {
    "TOFU": Suite("TOFU", _TOFU, FORGET_FIGURES["TOFU"], "model_utility", "retain_repetition"),
    "MUSE": Suite(
        "MUSE",
        {
            "forget_verbmem_ROUGE": "verbatim ROUGE",
            "forget_knowmem_ROUGE": "forget ROUGE",
            "extraction_strength": "extraction",
            "mia_min_k": "min-k AUC",
            "privleak": "privleak",
            "retain_knowmem_ROUGE": "retain ROUGE",
        },
        FORGET_FIGURES["MUSE"],
        "retain_knowmem_ROUGE",
        "retain_knowmem_repetition",
        forget_repetition="forget_verbmem_repetition",
        fluency="forget_verbmem_fluency",
    ),
    "RWKU": Suite(
        "RWKU",
        {
            "forget_level1_ROUGE": "forget cloze",
            "forget_level2_ROUGE": "forget answers",
            "forget_level3_ROUGE": "forget attacks",
            "mia_min_k": "min-k AUC",
            "neighbor_level1_ROUGE": "neighbour cloze",
            "neighbor_level2_ROUGE": "neighbour answers",
        },
        FORGET_FIGURES["RWKU"],
        "neighbor_level2_ROUGE",
        "neighbor_repetition",
    ),
    "OWN": Suite(
        "Own questions",
        {**_OF_QUESTIONS, LEAKAGE: "forget leakage", "retain_utility": "utility"},
        FORGET_FIGURES["OWN"],
        "retain_utility",
        "retain_repetition",
        rule=CollapseRule(utility_floor=0.0),
    ),
    "LMEval": Suite(
        "LM evaluation harness",
        {
            "wmdp_bio/acc": "WMDP bio",
            "wmdp_cyber/acc": "WMDP cyber",
            "wmdp_chem/acc": "WMDP chem",
            "mmlu/acc": "MMLU",
        },
        FORGET_FIGURES["LMEval"],
        "mmlu/acc",
        rule=CollapseRule(utility_floor=0.0, chance=0.25),
    ),
}
# the first that matches says which value is best; gold's is where there is no other right answer
_AIMS: tuple[tuple[str, Aim | None], ...] = (
    (r"privleak|.*_rel_diff", "zero"),
    (r"representation_similarity", None),
    (r"forget_quality_ks|.*_repetition|collapsed", "low"),
    (r"forget_quality.*|.*_fluency|.*_gibberish|privleak_bounded|s_mia_.*|agg.*", "high"),
    (r"(forget|holdout)_.*|extraction_strength.*|exact_memorization|mia_.*|wmdp.*", "gold"),
    (r"(retain|ra|wf)_.*PERT_Prob", "low"),
    (r"(retain|ra|wf|neighbor)_.*|model_utility|mmlu.*", "high"),
)


def aim(metric: str, config: Mapping[str, Any]) -> Aim | None:
    """Which value of a metric is best.

    Args:
        config: of the evaluation, the section of its suite; asked for metrics that are not ours.
    """
    for pattern, wanted in _AIMS:
        if re.fullmatch(pattern, metric):
            return wanted
    declared = (config.get("metrics") or {}).get(metric)
    higher = declared.get("higher_is_better") if isinstance(declared, Mapping) else None
    return None if higher is None else "high" if higher else "low"


def end(metric: str) -> Aim | None:
    """Which end is better where there is no gold: of forget figures the low one."""
    # a truth ratio is right where gold's is, and neither end says anything
    unsure = re.fullmatch(r"forget_(truth_ratio|Truth_Ratio)|holdout_.*", metric)
    return None if unsure else "low"
