"""The plan of a study where only a part of it can be known."""

from pathlib import Path

import pytest
from pretended import study

from unlora.studies.config import read
from unlora.studies.dry_run import forecasts
from unlora.studies.stages import plan


@pytest.mark.budget(4)
def test_memory_is_said_where_there_are_no_weights_to_time(folder):
    Path("root/model.safetensors").unlink()
    checked = read(study(seeds=[0], gold=None, methods={"NPO": ["trainer=NPO"]}))
    target, *_ = forecasts(checked, plan(checked, folder), folder)
    assert target.memory and target.trained and target.steps
    assert target.seconds is None
    assert "root" in target.note
