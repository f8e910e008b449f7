"""What a run says that SIGTERM ends before its first step."""

import os
import signal

import pytest

from unlora.trainer import Preemption


@pytest.mark.parametrize(
    "resume, said", [(None, "trained yet."), ("mine/checkpoint-2", "since mine/checkpoint-2.")]
)
def test_a_run_that_goes_on_is_not_said_to_have_trained_nothing(capsys, resume, said):
    with pytest.raises(SystemExit) as stopped, Preemption("mine", resume):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert capsys.readouterr().err.rstrip().endswith(said)
