"""What spreads work over processes and machines: batches, files for accelerate, launchers."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_trainer import small_trainer

from unlora.cli.compose import composed
from unlora.cli.messages import missing_config
from unlora.config import read
from unlora.errors import InputError
from unlora.trainer import UnlearningTrainer

FILES = Path(__file__).parents[1] / "configs" / "accelerate"


def layout(monkeypatch, processes, *words):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    words = ["experiment=unlearn/tofu/lora", *words]
    args = read(composed("unlearn", words)).trainer.args
    return args["per_device_train_batch_size"], args["gradient_accumulation_steps"]


@pytest.mark.default_cases(3)
@pytest.mark.parametrize(
    "words, processes, expected",
    [
        ((), 1, (4, 4)),
        ((), 8, (4, 4)),
        (("global_batch_size=16",), "", (4, 4)),
        (("global_batch_size=16",), 1, (4, 4)),
        (("global_batch_size=16",), 2, (4, 2)),
        (("global_batch_size=16",), 4, (4, 1)),
        (("global_batch_size=16",), 8, (2, 1)),
        (("global_batch_size=16",), 16, (1, 1)),
        (("global_batch_size=12", "trainer.args.per_device_train_batch_size=8"), 1, (6, 2)),
        (("global_batch_size=14",), 2, (1, 7)),
        (("global_batch_size=16", "trainer.args.gradient_accumulation_steps=3"), 1, (4, 4)),
    ],
)
def test_a_batch_is_shared_out(monkeypatch, words, processes, expected):
    assert layout(monkeypatch, processes, *words) == expected


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("rows, processes, near", [(10, 4, "8 or 12"), (3, 8, "8")])
def test_one_that_cannot_be_shared_is_a_sentence(monkeypatch, rows, processes, near):
    with pytest.raises(InputError) as wrong:
        layout(monkeypatch, processes, f"global_batch_size={rows}")
    assert str(wrong.value) == (
        f"global_batch_size is {rows}, which {processes} processes cannot share evenly. Set "
        f"global_batch_size={near}, or start another number of processes."
    )


@pytest.mark.slow
def test_it_is_a_whole_number_of_rows(monkeypatch):
    with pytest.raises(InputError, match="global_batch_size is 0; it must be greater than 0"):
        layout(monkeypatch, 1, "global_batch_size=0")
    with pytest.raises(InputError, match="global_batch_size is 2.5; it must be a whole number"):
        layout(monkeypatch, 1, "global_batch_size=2.5")


@pytest.mark.parametrize(
    "name, chosen",
    [("ddp", ()), ("two_nodes", ()), ("zero3", "use_deepspeed"),
     ("fsdp2", "use_fsdp")],
)  # fmt: skip
def test_a_file_says_what_accelerate_is_to_do(name, chosen):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = FILES / f"{name}.yaml"
    config = load_config_from_file(str(file))
    words = ["--config_file", str(file), "src/train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.use_deepspeed, args.use_fsdp) == (chosen == "use_deepspeed", chosen == "use_fsdp")
    assert args.multi_gpu == (not chosen) and args.num_processes == config.num_processes >= 2
    assert args.num_machines == (2 if name == "two_nodes" else 1)
    assert args.mixed_precision == "no", "bf16 is that of the weights"
    assert args.zero_stage == 3 or name != "zero3"
    assert int(args.fsdp_version) == 2 or name != "fsdp2"


def test_every_file_for_accelerate_is_tested_and_explained():
    names = {"ddp", "two_nodes", "zero3", "fsdp2"}
    assert {file.stem for file in FILES.glob("*.yaml")} == names
    page = (FILES.parents[1] / "docs" / "scaling.md").read_text("utf-8")
    assert all(f"configs/accelerate/{name}.yaml" in page for name in names)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "method, why",
    [(method, "composed of several gradients") for method in ("PDU", "BLADE", "GRU+SAM", "BalDRO")]
    + [("Negation", "need whole weights")],
)
def test_what_needs_whole_weights_is_refused_where_they_are_split(
    tmp_path, monkeypatch, method, why
):
    small_trainer(tmp_path, method)  # goes
    begin = UnlearningTrainer.create_accelerator_and_postprocess

    def split(self):
        begin(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(UnlearningTrainer, "create_accelerator_and_postprocess", split)
    small_trainer(tmp_path)  # goes, too
    with pytest.raises(InputError, match=f"{why}.* without deepspeed or fsdp"):
        small_trainer(tmp_path, method)


@pytest.mark.parametrize(
    "launcher, sentence",
    [
        ("submitit_slurm", "is not installed. Install it: pip install hydra-submitit-launcher"),
        ("ray", "is not installed. Install it: pip install hydra-ray-launcher"),
        ("jobli", "Did you mean 'joblib'?"),
    ],
)
def test_a_launcher_that_is_not_there_is_a_sentence(launcher, sentence):
    assert sentence in missing_config(f"hydra/launcher/{launcher}", "study", [])


@pytest.mark.parametrize("launcher", ["submitit_slurm", "submitit_local"])
def test_a_study_finds_the_launcher_of_slurm(launcher, tmp_path):
    if find_spec("submitit") is None:
        pytest.skip("hydra-submitit-launcher is not installed")
    words = ["experiment=study/pocket/lora", f"hydra/launcher={launcher}", "workers=3",
             "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90"]  # fmt: skip
    entry = [sys.executable, str(FILES.parents[1] / "src" / "study.py"), "--config-name=study"]
    done = subprocess.run(
        [*entry, "--cfg", "hydra", "-p", "hydra.launcher", *words], cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "gpus_per_node: 1" in done.stdout and "timeout_min: 90" in done.stdout
    assert "hydra_submitit_launcher" in done.stdout
