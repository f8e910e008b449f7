"""Runs of real processes that are stopped at a moment, and what they leave."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import tiny
from safetensors import safe_open

ZYGOTE = Path(__file__).with_name("fault_zygote.py")
RUN = "saves/unlearn/mine"
METHODS = {
    # with random states (dropout), and a best checkpoint that is not the last
    "NPO": (
        "trainer=NPO", "model.lora_config.lora_dropout=0.1",
        "trainer.args.load_best_model_at_end=true",
        "trainer.args.metric_for_best_model=forget_Q_A_Prob", "trainer.args.eval_strategy=steps",
        "trainer.args.eval_steps=2", "trainer.args.greater_is_better=true",
    ),
    "RMU": ("trainer=RMU", "trainer.method_args.layer=0", "model.lora_config.lora_dropout=0.1"),
    "PDU": (
        "trainer=PDU", "plugin=[GRU]", "trainer.method_args.dual_warmup_epochs=0",
        "trainer.method_args.dual_step_size=0.5",
    ),
    "BLADE": ("trainer=BLADE", "trainer.method_args.inner_lr=1e-3"),
}  # fmt: skip
COMMON = (
    "experiment=unlearn/pocket/lora", "model=any-lora", "task_name=mine",
    "model.model_args.pretrained_model_name_or_path=root",
    "model.tokenizer_args.pretrained_model_name_or_path=root",
    "model.model_args.torch_dtype=float32", "model.lora_config.r=4", "forget_split=forget01",
    "holdout_split=holdout01", "eval.tofu.panel_rows=2", "eval.tofu.max_new_tokens=2",
    "eval.tofu.panel=[forget_Q_A_Prob]", "trainer.args.disable_tqdm=true",
    "trainer.args.max_steps=8", "trainer.args.per_device_train_batch_size=2",
    "trainer.args.learning_rate=1e-3", "trainer.args.logging_steps=1",
    "trainer.args.lr_scheduler_type=linear", "trainer.args.save_strategy=steps",
    "trainer.args.save_steps=2", "trainer.args.resume_from_checkpoint=auto",
    "trainer.args.report_to=none",
)  # fmt: skip
METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob")


def without_other_metrics() -> list[str]:
    """Few metrics are quickly evaluated."""
    from omegaconf import OmegaConf

    shipped = Path(__file__).parents[2] / "configs" / "metrics" / "tofu.yaml"
    others = OmegaConf.load(shipped).default
    return [f"~eval.tofu.metrics.{name}" for name in others if name not in METRICS]


def command(method, *overrides):
    return ["unlearn", *COMMON, *without_other_metrics(), *METHODS[method], *overrides]


def prepared(folder: Path) -> Path:
    """A folder with a root model, from which runs start."""
    folder.mkdir(parents=True)
    tiny.llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tiny.tokenizer().save_pretrained(folder / "root")
    return folder


def environment(folder: Path) -> dict[str, str]:
    of_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in of_a_launcher} | {
        "OMP_NUM_THREADS": "1",
        "UNLORA_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ZYGOTE.parent), *os.environ.get("PYTHONPATH", "").split()]
        ),
    }


class Processes:
    """Real processes, forked by one that has imported everything; see ``fault_zygote``."""

    def __init__(self):
        self._zygote = subprocess.Popen(
            [sys.executable, str(ZYGOTE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment(Path("/nonexistent")),
        )  # fmt: skip
        self._answer()

    def start(self, folder: Path, argv, fault=None) -> int:
        """Begin a command in a folder; what it says goes to ``said.txt`` there."""
        if fault is not None:
            fault = {"under": str(folder), **fault}
        env = {"UNLORA_CACHE": str(folder / "cache")}
        return self._ask(
            {
                "argv": list(argv), "cwd": str(folder), "env": env, "fault": fault,
                "log": str(folder / "said.txt"),
            }
        )["pid"]  # fmt: skip

    def wait(self, pid: int) -> int:
        """The exit code; minus the number of the signal that ended it."""
        return self._ask({"wait": pid})["code"]

    def run(self, folder: Path, argv, fault=None) -> int:
        return self.wait(self.start(folder, argv, fault))

    def close(self):
        self._zygote.stdin.close()
        self._zygote.wait(timeout=30)

    def _ask(self, request):
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._zygote.stdout.readline()
        assert line, "the zygote is gone"
        return json.loads(line)


@contextmanager
def processes():
    found = Processes()
    try:
        yield found
    finally:
        found.close()


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text("utf-8")


def result(folder: Path) -> dict[str, object]:
    """Everything that a run leaves and that a resumed one must leave the same, bit for bit."""
    run = folder / RUN
    last = run / "checkpoint-8"
    names = [
        run / "adapter_model.safetensors", run / "evals" / "TOFU_EVAL.json",
        *(last / name for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt",
                                   "rng_state.pth", "objective.safetensors")),
    ]  # fmt: skip
    found = {str(f.relative_to(run)): f.read_bytes() for f in names if f.is_file()}
    state = json.loads((last / "trainer_state.json").read_text())
    best = ("best_metric", "best_global_step", "best_model_checkpoint", "global_step", "epoch")
    manifest = json.loads((run / "manifest.json").read_text())
    # the last entry is about the time that it took, and the steps of this start
    training = [entry for entry in manifest["training"] if "train_runtime" not in entry]
    return found | {
        "best": {key: state[key] for key in best},
        "log": training,
        "summary": manifest["summary"],
    }


def differences(one: dict, other: dict) -> list[str]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


def check_whole(folder: Path) -> int:
    """Every file that a reader may open can be read; returns how many there were."""
    checked = 0
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(re.search(r"\.tmp$", part) for part in parts):
            continue
        # a checkpoint is one once its state is there, and is not read before
        checkpoint = next((p for p in file.parents if p.name.startswith("checkpoint-")), None)
        unfinished = checkpoint is not None and not (checkpoint / "trainer_state.json").is_file()
        if unfinished and file.suffix not in (".json", ".safetensors"):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert list(tensors.keys()) is not None
        elif file.suffix == ".html":
            assert file.read_text("utf-8").rstrip().endswith("</html>")
        elif file.suffix in (".pt", ".pth"):
            import torch

            torch.load(file, weights_only=False)
        else:
            continue
        checked += 1
    return checked
