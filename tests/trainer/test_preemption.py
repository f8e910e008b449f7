"""What a run says that SIGTERM or Ctrl-C ends, and what it leaves."""

import os
import signal

import pytest
from small_trainer import small_trainer
from transformers import TrainerCallback

from unlora.trainer import Preemption
from unlora.trainer.checkpoints import fault


@pytest.mark.parametrize(
    "resume, said", [(None, "trained yet."), ("mine/checkpoint-2", "since mine/checkpoint-2.")]
)
def test_a_run_that_goes_on_is_not_said_to_have_trained_nothing(capsys, resume, said):
    with pytest.raises(SystemExit) as stopped, Preemption("mine", resume):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert capsys.readouterr().err.rstrip().endswith(said)


def test_ctrl_c_before_the_first_step_ends_at_once():
    with pytest.raises(KeyboardInterrupt, match="Stopped by Ctrl-C. Nothing was trained yet."):
        with Preemption("mine"):
            os.kill(os.getpid(), signal.SIGINT)


class Pressing(TrainerCallback):
    """Ctrl-C in these steps, so many times."""

    def __init__(self, steps, times=1):
        self.steps, self.times = steps, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for _ in range(self.times if state.global_step in self.steps else 0):
            os.kill(os.getpid(), signal.SIGINT)


def stopped(folder, **pressing):
    preemption = Preemption(str(folder))
    trainer = small_trainer(folder, callbacks=[preemption, Pressing(**pressing)])
    with pytest.raises(KeyboardInterrupt) as error, preemption:
        trainer.train()
    return str(error.value)


def test_ctrl_c_while_training_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, capfd):
    said = stopped(tmp_path, steps=[1])
    assert said == (
        f"Stopped by Ctrl-C. The checkpoint {tmp_path}/checkpoint-2 was written; the same command "
        "with trainer.args.resume_from_checkpoint=auto goes on there."
    )
    assert (
        "a checkpoint is written after this step; again ends it at once" in capfd.readouterr().err
    )
    assert fault(tmp_path / "checkpoint-2") is None


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(tmp_path):
    said = stopped(tmp_path, steps=[1], times=2)
    assert said.startswith("Stopped by Ctrl-C. What was trained since the last checkpoint is not")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_ctrl_c_while_evaluating_says_where_the_model_is():
    with pytest.raises(KeyboardInterrupt, match="The trained model is in mine, and its evaluation"):
        with Preemption("mine") as preemption:
            preemption.saved()
            os.kill(os.getpid(), signal.SIGINT)
