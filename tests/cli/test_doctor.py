"""The doctor says what is here, and whether a run would fit, before anything is loaded."""

import json

import pytest
import tiny

from unlora.cli.doctor import GIB, in_words, memory
from unlora.cli.main import main


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.fixture
def typed(tmp_path):
    """A training on files of the user's, of a folder with an architecture and no weights."""
    tiny.llama().config.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": "Who?", "answer": "word " * n} for n in (1, 4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    name = "TOFU_QA_full"
    return [
        *("experiment=finetune/tofu/lora", "model=model", "task_name=x"),
        f"data.train.{name}.args.hf_args.path=rows.json",
        f"data.train.{name}.args.hf_args.name=null",
    ]


def test_it_says_what_is_here(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    for line in ("python", "torch", "memory", "gpu", "disk", "hub"):
        assert f"\n{line} " in f"\n{said}"
    assert "GiB available" in said


@pytest.mark.slow
def test_a_run_is_estimated_by_part_without_its_weights(typed, capsys):
    main(["doctor", *typed])
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    # rank 128 on q, k, v, o, gate, up, down of two layers and on the head
    sums = 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80) + 332
    assert said["trained"].startswith(f"{128 * sums:,} (")
    for part in ("weights", "adapter", "gradients", "optimiser", "activations", "logits"):
        assert part in said
    assert "gradient checkpointing" in said["activations"]
    assert said["fits"].startswith("yes: ")


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would_help(typed, capsys, monkeypatch):
    monkeypatch.setattr("unlora.cli.doctor.memory", lambda: (GIB, 1 << 20))
    main(["doctor", *typed])
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert " no: " in verdict and "To need less: " in verdict
    assert "trainer.args.per_device_train_batch_size=1" in verdict


WRONG = {
    "typo in the experiment": ("experiment=unlearn/tofu/lroa", "Did you mean 'unlearn/tofu/lora'?"),
    "unknown key": ("experiment=unlearn/tofu/lora task_nmae=x", "Did you mean 'task_name'?"),
    "no experiment": ("model=pocket", "without an experiment. Type: unlora doctor"),
    "a study": ("experiment=study/pocket/lora", "Type: unlora study experiment=study/pocket/lora"),
    "an evaluation": ("experiment=eval/tofu/lora", "--plan"),
    "of another config": ("experiment=unlearn/tofu/lora -cn train", "Use: unlora unlearn"),
    "a flag of another": ("experiment=unlearn/tofu/lora --plan", "--plan is a flag of"),
}


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("typed, says", WRONG.values(), ids=WRONG)
def test_a_wrong_run_is_one_sentence(capsys, typed, says):
    with pytest.raises(SystemExit) as left:
        main(["doctor", *typed.split()])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "more, says",
    [
        ("trainer.method_args.bta=1", "FinetuneTrainer takes no method_args"),
        ("trainer.args.bf16=maybe", "trainer.args.bf16 is 'maybe'; it must be true or false."),
        ("model.lora_config.target_modules=[q_porj]", "Did you mean 'q_proj'?"),
    ],
)
def test_what_would_stop_the_run_later_is_said_now(typed, capsys, more, says):
    with pytest.raises(SystemExit) as left:
        main(["doctor", *typed, more])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and "python" in out


@pytest.mark.slow
def test_a_model_out_of_reach_is_one_sentence_below_the_machine(capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "experiment=finetune/pocket/lora", "model=no/where"])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert "\ndisk " in out and "'no/where' is not in the local cache" in err
    assert err.count("\n") == 1


def test_memory_is_that_of_the_container_where_it_has_less(monkeypatch):
    found = {"memory.max": 5 * GIB, "memory.current": 2 * GIB, "meminfo": 1 << 40}
    monkeypatch.setattr(
        "unlora.runs.machine._number_in", lambda file, label="": found[file.rpartition("/")[2]]
    )
    assert memory() == (5 * GIB, 3 * GIB)


def test_bytes_are_written_as_people_read_them():
    assert [in_words(size) for size in (2048, 3 << 20, 5 * GIB)] == ["2 KiB", "3.0 MiB", "5.0 GiB"]
