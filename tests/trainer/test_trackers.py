"""What a tracker is told of a run, and that it is another run each time."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer.test_trainer import lora_model, trainer_for
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from unlora.errors import InputError
from unlora.trainer import Guards, Trackers, UnlearningLoss
from unlora.trainer.trackers import check_installed


def scalars(folder):
    """Name -> step -> value of all event files in a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def train(folder, *names, until=3, gamma=1.0, **args):
    guards = Guards()
    tracked = Trackers(names, folder, guards)
    loss = UnlearningLoss.build("GradDiff", gamma=gamma, alpha=1.0, retain_loss_type="NLL")
    trainer = trainer_for(
        folder, loss, lora_model(), callbacks=[guards, tracked], max_steps=until, **args
    )
    trainer.train(resume_from_checkpoint=args.get("resume_from_checkpoint"))
    return trainer, tracked


class Recorder(TrainerCallback):
    """As transformers' own callbacks for trackers are called."""

    def __init__(self):
        self.seen = []
        Recorder.last = self

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(f"begin {args.run_name}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("end")


@pytest.fixture
def recorder(monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Recorder)


@pytest.mark.slow
def test_tensorboard_has_the_log_of_training_the_guards_and_the_evaluation(tmp_path):
    # transformers 4 has no norm to tell where nothing is clipped
    trainer, tracked = train(tmp_path, "tensorboard", max_grad_norm=1e9)
    tracked.evaluated({"forget_Q_A_Prob": 0.25, "empty": float("nan")})
    tracked.close()
    found = scalars(tmp_path / "logs")
    for name in ("loss", "forget_loss", "retain_loss", "learning_rate", "grad_norm"):
        logged = {e["step"]: e[name] for e in trainer.state.log_history if name in e}
        assert found[f"train/{name}"] == pytest.approx(logged) and len(logged) == 3
    assert found["train/guard/gradients_alive"] == {1: 1.0}
    assert found["eval/forget_Q_A_Prob"] == {3: 0.25}
    assert "eval/empty" not in found


@pytest.mark.slow
def test_a_run_that_goes_on_takes_back_what_came_after_its_checkpoint(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2}
    _, tracked = train(tmp_path, "tensorboard", until=4, **save)
    tracked.close()
    before = scalars(tmp_path / "logs")["train/loss"]
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "gamma": 2.0, **save}
    _, tracked = train(tmp_path, "tensorboard", until=4, **again)
    tracked.close()
    after = scalars(tmp_path / "logs")["train/loss"]
    assert list(after) == [1, 2, 3, 4]
    assert after[1] == before[1] and after[4] != before[4]


@pytest.mark.slow
def test_only_the_main_process_writes_and_only_when_asked(tmp_path):
    trainer, tracked = train(tmp_path)
    tracked.evaluated({"a": 1.0})
    tracked.close()
    trainer.state.is_world_process_zero = False
    other = Trackers(["tensorboard"], tmp_path, Guards())
    other.on_train_begin(trainer.args, trainer.state, trainer.control)
    other.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    other.close()
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_other_trackers_stay_open_until_the_evaluation_is_told(tmp_path, recorder):
    _, tracked = train(tmp_path, "wandb", run_name="mine")
    seen = Recorder.last.seen
    assert seen[0] == "begin mine" and "end" not in seen
    assert {"forget_loss", "retain_loss", "guard/gradients_alive"} <= seen[1].keys()
    tracked.evaluated({"forget_Q_A_Prob": 0.25})
    tracked.close()
    assert seen[-2:] == [{"eval_forget_Q_A_Prob": 0.25}, "end"]


@pytest.mark.slow
def test_mlflow_is_told_the_same_names(tmp_path, recorder):
    _, tracked = train(tmp_path, "mlflow")
    tracked.evaluated({"forget_Q_A_Prob": 0.25})
    tracked.close()
    seen = Recorder.last.seen
    assert {"train/forget_loss", "train/guard/gradients_alive"} <= seen[1].keys()
    assert seen[-2] == {"eval/forget_Q_A_Prob": 0.25}


@pytest.mark.slow
def test_our_run_of_wandb_is_finished_and_no_other(tmp_path, recorder, monkeypatch):
    class Wandb:
        run = None

    class Run:
        finished = 0

        def finish(self):
            Run.finished += 1

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    for before, finished in ((None, 1), (Run(), 1)):
        Wandb.run = before
        _, tracked = train(tmp_path, "wandb", until=1)
        Wandb.run = Wandb.run or Run()
        tracked.close()
        assert Run.finished == finished


@pytest.mark.parametrize(
    "name, said",
    [
        ("wandb", "wandb, which is not installed. Run: pip install wandb, or"),
        ("comet_ml", "pip install comet-ml"),
        ("wandbb", "Did you mean 'wandb'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_in_one_sentence(name, said, monkeypatch):
    monkeypatch.setattr("unlora.trainer.trackers.find_spec", lambda module: None)
    with pytest.raises(InputError, match=said) as error:
        check_installed([name])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_no_key_of_a_tracker_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k3y-of-wandb")
    _, tracked = train(tmp_path, "tensorboard", until=1, hub_token="k3y-of-hub")
    tracked.close()
    written = b"".join(file.read_bytes() for file in (tmp_path / "logs").iterdir())
    assert b"hub_token" in written and b"k3y-of" not in written
