from pathlib import Path

import pytest

from unlora.errors import InputError
from unlora.study import _checked, plan

STUDY = {
    "seeds": [0, 1],
    "target": ["experiment=finetune/pocket/lora"],
    "gold": ["experiment=finetune/pocket/lora", "x=retain90"],
    "unlearn": ["experiment=unlearn/pocket/lora"],
    "methods": {"NPO": ["trainer=NPO"], "GradAscent": None},
    "paths": {"output_dir": "saves/study/pocket"},
}


def test_the_plan_trains_gold_then_target_then_every_method_for_each_seed():
    stages = plan(_checked(STUDY), Path("home"))
    assert [(s.run, s.seed, s.after) for s in stages[:4]] == [
        ("gold", 0, None),
        ("target", 0, "gold"),
        ("NPO", 0, "target"),
        ("GradAscent", 0, "target"),
    ]
    assert len(stages) == 8
    npo = next(s for s in stages if s.run == "NPO" and s.seed == 1)
    assert npo.config == "unlearn"
    assert npo.overrides == (
        "experiment=unlearn/pocket/lora",
        "trainer=NPO",
        "model.model_args.pretrained_model_name_or_path=home/seed1/target",
        "trainer.args.seed=1",
        "paths.output_dir=home/seed1/NPO",
        "retain_logs_path=home/seed1/gold/evals",
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": 3}, "needs seeds: a list of numbers; it is 3"),
        ({"methods": {}}, "needs methods"),
        ({"methods": {"gold": []}}, "cannot be called 'gold'"),
        ({"workers": 0}, "workers is 0"),
        ({"seedz": [1]}, "Did you mean 'seeds'"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(change, message):
    with pytest.raises(InputError, match=message):
        _checked({**STUDY, **change})
