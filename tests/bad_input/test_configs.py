"""Wrong words, values and combinations in a config: one sentence, exit code 2, nothing written.

Every case is typed as a user types it. What is said names what was given and what is allowed, and
it is said before any weights are loaded.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from unlora.cli.main import main

ROOT = Path(__file__).parents[2]
UNLEARN = "unlearn experiment=unlearn/wmdp/lora "  # composes fastest
TRAIN = "train experiment=finetune/tofu/lora "
EVAL = "eval experiment=eval/tofu/default model=Qwen2.5-0.5B-Instruct "
STUDY = "study experiment=study/pocket/lora --dry-run "
ARGS, METHOD, LORA = "trainer.args.", "trainer.method_args.", "model.lora_config."
CASES = {
    # names: what was meant, and all there are
    "unknown command": ("unlern experiment=unlearn/wmdp/lora", "Did you mean 'unlearn'?"),
    "unknown experiment": ("unlearn experiment=unlearn/tofo/lora", "tofu/lora"),
    "experiment of another command": ("train experiment=unlearn/tofu/lora", "unlora unlearn"),
    "unknown trainer": (UNLEARN + "trainer=NPOO", "Did you mean 'NPO'?"),
    "unknown handler": (UNLEARN + "trainer.handler=npo", "Did you mean 'NPO'?"),
    "unknown model": (UNLEARN + "model=Qwen2.5-3B-Instruct-lorra", "Qwen2.5-3B-Instruct-lora"),
    "unknown plug-in": (UNLEARN + "plugin=[SAMM]", "SAM"),
    "unknown retain loss": (UNLEARN + METHOD + "retain_loss_type=NNL", "Did you mean 'NLL'?"),
    "unknown hyper-parameter": (UNLEARN + "trainer=NPO " + METHOD + "bta=1", "'beta'"),
    "unknown argument": (UNLEARN + ARGS + "learning_rte=1e-4", "Did you mean 'learning_rate'?"),
    "unknown key": (UNLEARN + "modle.use_lora=true", "Unknown key 'modle'. Did you mean"),
    "a key without its section": (UNLEARN + "learning_rate=1", "mean trainer.args.learning_rate?"),
    "a key of LoRA without its section": (UNLEARN + "r=8", "Did you mean model.lora_config.r?"),
    "several runs of nothing": ("unlearn -m trainer=NPO,DPO", "experiment is missing. Give exp"),
    "several evaluations of nothing": ("eval -m", "experiment is missing. Give experiment=NAME."),
    "several runs without a name": (UNLEARN + "-m task_name=???", "task_name has no value. Give"),
    "unknown key of LoRA": (UNLEARN + LORA + "lora_alhpa=8", "Did you mean 'lora_alpha'?"),
    "unknown data set": (UNLEARN + "data/datasets@data.forget=TOFU_frget", "TOFU_"),
    "unknown metric": (
        EVAL + "+eval/tofu_metrics=[forget_Q_A_Probb]", "Did you mean 'forget_Q_A_Prob'?"
    ),
    "unknown dtype": (UNLEARN + "model.model_args.torch_dtype=bfloat61", "'bfloat16'"),
    "unknown side": (UNLEARN + "model.tokenizer_args.padding_side=foo", "Known: left, right."),
    "unknown device map": (UNLEARN + "model.model_args.device_map=atuo", "auto"),
    "unknown study": ("study experiment=study/tofo/lora", "tofu/lora"),
    # types
    "text for a number": (UNLEARN + ARGS + "learning_rate=fast", "must be a number"),
    "fraction for a count": (UNLEARN + ARGS + "per_device_train_batch_size=2.5", "whole number"),
    "number for a switch": (UNLEARN + "model.use_lora=3", "true or false"),
    "list for a section": (UNLEARN + "model.lora_config=[1,2]", "lora_config"),
    "text for a rank": (UNLEARN + LORA + "r=big", "whole number"),
    "word for a hyper-parameter": (UNLEARN + "trainer=NPO " + METHOD + "beta=high", "a number"),
    "section for a file": (UNLEARN + "retain_logs_path={a:1}", "retain_logs_path"),
    "nothing for what is needed": (UNLEARN + "task_name=???", "Give task_name="),
    # ranges
    "beta of 0": (UNLEARN + "trainer=NPO " + METHOD + "beta=0", "must be above 0"),
    "negative beta": (UNLEARN + "trainer=SimNPO " + METHOD + "beta=-1", "must be above 0"),
    "beta that is no number": (UNLEARN + "trainer=NPO " + METHOD + "beta=nan", "above 0"),
    "negative alpha": (UNLEARN + METHOD + "alpha=-1", "0 or more"),
    "infinite gamma": (UNLEARN + METHOD + "gamma=inf", "0 or more"),
    "negative layer": (UNLEARN + "trainer=RMU " + METHOD + "layer=-1", "0 or more"),
    "share above 1": (UNLEARN + "trainer=BST " + METHOD + "lambda_bst=2", "1 or less"),
    "learning rate below 0": (UNLEARN + ARGS + "learning_rate=-1e-4", "learning_rate is -0.0001"),
    "infinite learning rate": (UNLEARN + ARGS + "learning_rate=inf", "finite"),
    "no rows at once": (UNLEARN + ARGS + "per_device_train_batch_size=0", "greater than 0"),
    "no accumulation": (UNLEARN + ARGS + "gradient_accumulation_steps=0", "greater than 0"),
    "no epochs": (UNLEARN + ARGS + "num_train_epochs=0", "greater than 0"),
    "negative seed": (UNLEARN + ARGS + "seed=-1", "0"),
    "rank 0": (UNLEARN + LORA + "r=0", "greater than 0"),
    "dropout above 1": (UNLEARN + LORA + "lora_dropout=1.5", "less than 1"),
    "dropout below 0": (UNLEARN + LORA + "lora_dropout=-0.1", "0"),
    "LoRA alpha 0": (UNLEARN + LORA + "lora_alpha=0", "greater than 0"),
    "SAM that does not move": (UNLEARN + "plugin=[SAM] trainer.plugins.SAM.rho=0", "above 0"),
    "negative warm-up": (UNLEARN + ARGS + "warmup_epochs=-1", "warmup_epochs is -1"),
    "no rows in a step": (UNLEARN + "global_batch_size=0", "greater than 0"),
    # contradictions
    "two warm-ups": (UNLEARN + ARGS + "warmup_ratio=0.1 " + ARGS + "warmup_steps=3", "Give one"),
    "biases that stay on": (UNLEARN + LORA + "bias=all", "bias=none"),
    "nothing to minimise": (UNLEARN + METHOD + "alpha=0 " + METHOD + "gamma=0", "minimise"),
    "fine-tuning that unlearns": (UNLEARN + "trainer.handler=FinetuneTrainer", "mode is unlearn"),
    "no retain data": (UNLEARN + "trainer=NPO data.retain=null", "data.retain is not set"),
    "two starts": (UNLEARN + "plugin=[FILA,ReGLU]", "Choose one"),
    "a plug-in without LoRA": (UNLEARN + "plugin=[LoRAPlus] model.use_lora=false", "use_lora=true"),
    "a folder that is everything": (UNLEARN + "paths.output_dir=.", "a folder of its own"),
    "a task name that leaves saves": (UNLEARN + "task_name=../../x", "below saves"),
    "a reference to nothing": (UNLEARN + "task_name=${nowhere}",
                               "task_name=${nowhere} refers to nowhere, and the config has no"),
    "a folder that refers to nothing": (UNLEARN + "-m paths.output_dir=${HOME}/x",
                                        "paths.output_dir=${HOME}/x refers to HOME, and the"),
    "a reference to itself": (UNLEARN + "paths.output_dir=${paths.output_dir}/x",
                              "paths.output_dir=${paths.output_dir}/x refers to itself"),
    "references in a circle": (UNLEARN + "paths.root_dir=${paths.output_dir}",
                               "paths.root_dir=${paths.output_dir} refers to itself, maybe thr"),
    "a resolver that is not there": (UNLEARN + LORA + "r=${nope:3}", "r=${nope:3} asks for nope"),
    "a checkpoint that is not there": (
        TRAIN + ARGS + "resume_from_checkpoint=nowhere model=./nowhere", "nowhere"
    ),
    "an unknown optimiser": (UNLEARN + ARGS + "optim=adamm", "adamm"),
    "an unknown tracker": (UNLEARN + ARGS + "report_to=wandbb", "wandbb"),
    "a broken override": (UNLEARN + "trainer.args.seed", "trainer.args.seed"),
    "a study of nothing": (STUDY + "methods=[]", "method"),
    "a key of a study's list": (
        STUDY + "unlearn.global_batch_size=8", "unlearn: [..., global_batch_size=8]"
    ),
    "a deep key of a study's list": (
        STUDY + "+target.trainer.args.seed=3", "target: [..., trainer.args.seed=3]"
    ),
    "a study of an unknown method": (STUDY + "methods=[NPOO]", "NPO"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_loaded_or_written(tmp_path, monkeypatch):
    """Weights must not load, and the folder must stay as it is."""
    import unlora.model
    import unlora.recipes.training_plan

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(unlora.model, "get_model", loaded)
    monkeypatch.setattr(unlora.recipes.training_plan, "get_model", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves" / "kept.txt").write_text("kept")
    yield
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert [name for name in left if not name.startswith(".")] == ["saves/kept.txt"]
    assert (tmp_path / "saves" / "kept.txt").read_text() == "kept"


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_config_is_one_sentence(name, capfd):
    typed, said = CASES[name]
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    message = capfd.readouterr().err
    assert ended.value.code == 2, message
    assert said in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) <= 3, message


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("script", ["train.py --config-name=unlearn", "eval.py"])
def test_the_scripts_end_with_code_2_and_no_traceback(script, tmp_path):
    file, *rest = script.split()
    name = "unlearn/wmdp/lora" if rest else "eval/tofu/default"
    command = [sys.executable, ROOT / "src" / file, *rest, f"experiment={name}", "model.use_lora=3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "true or false" in ended.stderr and "Traceback" not in ended.stderr
