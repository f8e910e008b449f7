"""A key that a command does not use is an error: nobody shall believe that it did something."""

import pytest

from unlora.cli import main
from unlora.cli.compose import composed
from unlora.config import read
from unlora.errors import InputError

TRAIN = ("train", "experiment=finetune/own/lora", "model=m/x", "data.train=train.jsonl")
UNLEARN = ("unlearn", "experiment=unlearn/own/lora", "model=m/x", "data.forget=forget.jsonl",
           "data.retain=retain.jsonl", "trainer=NPO")  # fmt: skip
ALTERNATES = ("alternates", "experiment=unlearn/own/lora", "model=m/x", "data.forget=forget.jsonl")
EVAL = ("eval", "model=m/x", "data.forget=forget.jsonl")
POCKET = ("unlearn", "experiment=unlearn/pocket/lora", "trainer=NPO")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    for name in ("train", "forget", "retain", "holdout", "other"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')
    monkeypatch.chdir(tmp_path)


def of_command(*words):
    """The sentence with which a command refuses its config; None where it takes it."""
    command, *rest = words
    said = []
    try:
        main.launch(lambda cfg: said.append(read(cfg)), command, rest)
    except SystemExit as ended:
        assert ended.code == 2
        return True
    assert said
    return None


# every command x every part of the data; those that it reads are None
DATA = [
    (TRAIN, "forget", "a fine-tuning reads data.train only"),
    (TRAIN, "retain", "a fine-tuning reads data.train only"),
    (TRAIN, "holdout", "a fine-tuning reads data.train only"),
    (TRAIN, "alternate", "a fine-tuning reads data.train only"),
    (UNLEARN, "train", "reads only where there is no data.retain"),
    (UNLEARN, "holdout", None),
    (UNLEARN, "alternate", None),
    (ALTERNATES, "train", "unlora alternates reads data.forget only"),
    (ALTERNATES, "retain", "unlora alternates reads data.forget only"),
    (ALTERNATES, "holdout", "unlora alternates reads data.forget only"),
    (EVAL, "train", "an evaluation reads data.forget and data.retain and data.holdout only"),
    (EVAL, "alternate", "an evaluation reads data.forget and data.retain"),
    (EVAL, "retain", None),
    (EVAL, "holdout", None),
]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("words, part, said", DATA, ids=lambda x: str(x)[2:12])
def test_data_that_a_command_does_not_read_are_refused(words, part, said, capfd):
    refused = of_command(*words, f"data.{part}=other.jsonl")
    assert refused == (said and True)
    assert (
        not said
        or f"data.{part} is set, but {said}" in (message := capfd.readouterr().err)
        or said in message
    )


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("part", ["retain", "forget", "alternate"])
def test_so_are_data_sets_of_a_fine_tuning(part):
    words = ["experiment=finetune/tofu/lora", f"+data/datasets@data.{part}=TOFU_QA_forget"]
    with pytest.raises(InputError, match=f"data.{part} is set, but a fine-tuning reads data.train"):
        read(composed("train", words))


def test_data_that_another_part_of_the_config_refers_to_are_used():
    words = [
        "experiment=finetune/own/lora", "model=m/x", "data.train=train.jsonl",
        "data.forget=forget.jsonl", "+eval.own.handler=x", "eval.own.a='${data.forget}'",
    ]  # fmt: skip
    assert read(composed("train", words)).data.keys() == {"train", "forget"}


@pytest.mark.slow
def test_an_unlearning_may_take_its_retain_data_from_a_data_set_to_train_on():
    words = ["experiment=unlearn/tofu/lora", "data.retain=null",
             "+data/datasets@data.train=TOFU_QA_retain"]  # fmt: skip
    assert "train" in read(composed("unlearn", words)).data
    with pytest.raises(InputError, match="where there is no data.retain"):
        read(composed("unlearn", [*words[:1], *words[2:]]))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "words, more, said",
    [
        (UNLEARN, "alternates.repeats=3", "unlora unlearn does not use it"),
        (TRAIN, "alternates.prompt='{question}'", "a fine-tuning does not use it"),
        (ALTERNATES, "+plan=true", "unlora alternates does not use it"),
        (TRAIN, "+output=json", "a fine-tuning does not use it"),
        (TRAIN, "seed=1", "Did you mean trainer.args.seed?"),
        (TRAIN, "+seed=1", "a fine-tuning does not use it. Give trainer.args.seed instead."),
        (ALTERNATES, "+seed=1", "Give alternates.seed instead."),
        (EVAL, "seed=1", None),
        (EVAL, "trainer.args.seed=3", "an evaluation does not use it"),
        (EVAL, "+global_batch_size=3", "an evaluation does not use it"),
        (EVAL, "collator.x.handler=y", "an evaluation does not use it"),
        (TRAIN, "+forget_split=forget10", "no use in this experiment"),
        (UNLEARN, "+data_split=News", "no use in this experiment"),
        (POCKET, "+data_sub_set=x", "no use in this experiment"),
        (POCKET, "+answer_key=x", "no use in this experiment"),
        (UNLEARN, "answer_key=answer", None),
        (TRAIN, "question_key=question", None),
        (POCKET, "forget_split=forget10", None),
        (ALTERNATES, "alternates.repeats=3", None),
        (EVAL, "question_key=question", None),
    ],
    ids=lambda x: str(x)[:20],
)  # fmt: skip
def test_settings_of_another_command_are_refused(words, more, said, capfd):
    refused = of_command(*words, more)
    assert refused == (said and True)
    assert not said or said in capfd.readouterr().err
