"""A damaged checkpoint is not gone on from: the whole one before is, or the run says why not."""

import json
import os
import shutil

import pytest
from small_trainer import small_trainer, trained

from unlora.errors import InputError
from unlora.model.lineage import Lineage
from unlora.trainer.arguments import training_arguments
from unlora.trainer.checkpoints import RECORD, checkpoint_to_resume, fault, whole_checkpoints

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
FILES = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "lineage.json",
    "adapter_model.safetensors", "adapter_config.json", "objective.safetensors", "tokenizer.json",
    RECORD,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with three checkpoints, and what it has learnt."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    trainer = small_trainer(folder, "RMU", dropout=0.1, **SETTINGS)
    trainer.train()
    return folder, trained(trainer)


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "mine")
    return tmp_path / "mine"


def chosen(folder, wanted="auto", *, unchecked=False, lineage="tiny", **given):
    given = {"report_to": "none", "resume_from_checkpoint": wanted, **given}
    args = training_arguments(given, output_dir=str(folder))
    return checkpoint_to_resume(args, Lineage(lineage), unchecked=unchecked)


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "one bit flipped": flipped,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "of an earlier checkpoint": lambda file: shutil.copy(
        file.parents[1] / "checkpoint-4" / file.name, file
    ),
}
SAME_IN_BOTH = ("lineage.json", "adapter_config.json", "objective.safetensors", "tokenizer.json")
KINDS = [
    (name, kind)
    for name in FILES
    for kind in DAMAGE
    # RMU's direction and the settings are the same all the time; of the record, see below
    if not (kind.startswith("of an") and name in (*SAME_IN_BOTH, RECORD))
]


@pytest.mark.default_cases(8)
@pytest.mark.parametrize("name, kind", KINDS)
def test_the_whole_checkpoint_before_a_damaged_one_is_taken_and_said(copied, caplog, name, kind):
    last = copied / "checkpoint-6"
    assert chosen(copied) == str(last) and not caplog.text
    DAMAGE[kind](last / name)
    expected = str(copied / "checkpoint-4")
    assert chosen(copied) == chosen(copied, True) == expected
    said = caplog.messages[0]
    assert said.startswith("checkpoint-6 is not used: it") and name in said
    assert said.endswith("; going on from checkpoint-4")
    with pytest.raises(
        InputError, match="cannot be gone on from: .*set|Set .*checkpoint-4|is no che"
    ):
        chosen(copied, str(last))


def edited(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


OTHER_KINDS = {
    "an empty folder": lambda last: (shutil.rmtree(last), last.mkdir()),
    "a file in place of the folder": lambda last: (shutil.rmtree(last), last.write_text("")),
    "another step in the state": lambda last: edited(last / "trainer_state.json", global_step=5),
    "another hash in the record": lambda last: edited(last / RECORD, files={}),
    "the record of an earlier checkpoint": lambda last: shutil.copy(
        last.parent / "checkpoint-4" / RECORD, last
    ),
    "a record that is a list": lambda last: (last / RECORD).write_text("[]"),
    "a link to nowhere": lambda last: (
        (last / "optimizer.pt").unlink(), (last / "optimizer.pt").symlink_to("nowhere")
    ),
    "a pipe that nobody writes to": lambda last: (
        (last / "optimizer.pt").unlink(), os.mkfifo(last / "optimizer.pt")
    ),
    "weights alone": lambda last: [
        (last / name).unlink() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_so_it_is_whatever_is_wrong_with_a_checkpoint(copied, kind):
    OTHER_KINDS[kind](copied / "checkpoint-6")
    assert chosen(copied) == str(copied / "checkpoint-4")


def test_a_checkpoint_under_another_number_is_what_it_is(copied):
    shutil.rmtree(copied / "checkpoint-6")
    shutil.copytree(copied / "checkpoint-4", copied / "checkpoint-6")
    assert fault(copied / "checkpoint-6") is None  # of step 4, as its state says


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "name, kind",
    [
        ("optimizer.pt", "missing"),
        ("rng_state.pth", "cut"),
        ("adapter_model.safetensors", "one bit flipped"),
    ],
)
def test_a_run_that_goes_on_past_damage_ends_as_the_whole_one(run, copied, name, kind):
    DAMAGE[kind](copied / "checkpoint-6" / name)
    path = chosen(copied)
    trainer = small_trainer(copied, "RMU", dropout=0.1, **SETTINGS)
    before = trained(trainer)
    trainer.train(resume_from_checkpoint=path)
    after = trained(trainer)
    assert any((before[key] != after[key]).any() for key in after)
    assert all((after[key] == run[1][key]).all() for key in after)


def test_where_no_checkpoint_is_whole_auto_begins_anew_and_true_is_refused(copied, caplog):
    for folder in copied.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    assert whole_checkpoints(copied) == []
    assert chosen(copied) is None
    assert caplog.messages[0].endswith("; there is no other, so the run begins anew")
    assert all(f"checkpoint-{n} is not used" in caplog.messages[0] for n in (2, 4, 6))
    with pytest.raises(InputError, match="no whole checkpoint: checkpoint-6 is not used: its opti"):
        chosen(copied, True)


def test_checkpoints_without_a_record_are_taken_by_consent_alone(copied):
    """As an earlier version has written them."""
    for folder in copied.glob("checkpoint-*"):
        (folder / RECORD).unlink()
    for wanted in ("auto", True, str(copied / "checkpoint-6")):
        with pytest.raises(InputError, match="trainer.on_change=resume takes it without a check"):
            chosen(copied, wanted)
        assert chosen(copied, wanted, unchecked=True) == str(copied / "checkpoint-6")
    (copied / "checkpoint-6" / RECORD).write_text("{}")
    assert chosen(copied, unchecked=True) == str(copied / "checkpoint-4")  # damaged, and not of old


@pytest.mark.parametrize("damage", ["missing", "one bit flipped"])
def test_a_best_checkpoint_that_is_damaged_is_needed_only_where_the_best_is_kept(copied, damage):
    trainer = small_trainer(copied, "RMU", **SETTINGS, save_total_limit=3)
    trainer.panels = [lambda model: {"mine": 1.0}]
    trainer.args.eval_strategy = "steps"
    trainer.state.best_model_checkpoint = str(copied / "checkpoint-2")
    trainer.state.global_step = 8
    trainer.create_optimizer_and_scheduler(8)
    trainer._save_checkpoint(trainer.model, None)
    assert chosen(copied) == str(copied / "checkpoint-8")
    DAMAGE[damage](copied / "checkpoint-2" / "adapter_model.safetensors")
    assert chosen(copied) == str(copied / "checkpoint-8")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mine",
            "eval_strategy": "epoch", "save_strategy": "epoch"}  # fmt: skip
    assert "of checkpoint-2, the best one until then, its adapter" in str(
        fault(copied / "checkpoint-8", needs_best=True)
    )
    assert chosen(copied, **best) == str(copied / "checkpoint-6")
    with pytest.raises(InputError, match="The best checkpoint, .*cannot be taken"):
        trainer._load_best_model()


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_says_so(tmp_path):
    small_trainer(tmp_path, **SETTINGS, save_only_model=True).train()
    assert "trainer.args.save_only_model" in str(fault(tmp_path / "checkpoint-6"))
    with pytest.raises(InputError, match="it has no optimiser"):
        chosen(tmp_path, True)


def test_a_root_model_that_changed_is_refused(copied, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "config.json").write_text("{}")
    lineage = json.loads((copied / "checkpoint-6" / "lineage.json").read_text())
    lineage["root"] = {"path": "../../root", "given": str(root), "local": True, "fingerprint": "x"}
    (copied / "checkpoint-6" / "lineage.json").write_text(json.dumps(lineage))
    (copied / "checkpoint-6" / RECORD).unlink()
    with pytest.raises(InputError, match="has changed since the checkpoint"):
        chosen(copied, str(copied / "checkpoint-6"), unchecked=True, lineage=str(root))


def test_what_others_lay_into_a_checkpoint_changes_nothing(copied):
    (copied / "checkpoint-6" / "evals").mkdir()
    (copied / "checkpoint-6" / "evals" / "TOFU_EVAL.json").write_text("{}")
    (copied / "checkpoint-x").mkdir()
    assert chosen(copied) == str(copied / "checkpoint-6")
