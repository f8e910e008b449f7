"""Other answers to the forget questions, from the command line to the step of AltPO."""

import json
from contextlib import redirect_stdout
from importlib import resources
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import llama, tokenizer

from unlora.cli import compose
from unlora.cli.main import launch, main, normalised
from unlora.config import read
from unlora.config.schema import AlternatesKeys
from unlora.data import load_parts
from unlora.data.chat_encoding import Chat
from unlora.data.rows import load_rows
from unlora.errors import InputError
from unlora.recipes import alternate_answers, train
from unlora.recipes.alternate_answers import Pair, make, read_pairs

CONFIGS = Path(__file__).parents[2] / "configs"
POCKET = "experiment=unlearn/pocket/lora"
SMALL = ("model.model_args.torch_dtype=float32", "forget_split=forget01", "model.lora_config.r=4",
         "model.tokenizer_args.pretrained_model_name_or_path=root")  # fmt: skip
SETTINGS = {"repeats": 3, "tries": 2, "seed": 0, "prompt": None, "temperature": 1.0, "top_p": 1.0,
            "max_new_tokens": 12, "batch_size": 4}  # fmt: skip
PAIRS = [Pair("Who wrote it?", "Ana"), Pair("Where was the author born?", "In Oslo"),
         Pair("What?", "A novel")]  # fmt: skip


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer(), {"apply_chat_template": True})


def brief(**shape):
    """A random model that ends its answers after a few tokens."""
    model = llama(**shape).eval()
    model.get_output_embeddings().weight.data[tokenizer().eos_token_id] *= 3
    return model


@pytest.fixture(scope="module")
def model():
    return brief()


def composed(name, *words):
    return compose.composed(name, normalised(words))


def says(monkeypatch, *rounds):
    """Let the model answer in each round as said, and keep what it was asked."""
    asked, left = [], list(rounds)

    def generate(model, prompts, *args, sampling, **settings):
        asked.append([tuple(key) for key in sampling.keys])
        return left.pop(0)

    monkeypatch.setattr("unlora.evals.passes.generate", generate)
    return asked


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    brief(max_position_embeddings=512).save_pretrained("root")
    tokenizer().save_pretrained("root")
    return tmp_path


@pytest.mark.slow
def test_answers_are_keyed_by_row_and_not_by_batch(model, chat):
    one, counts = make(model, chat, PAIRS, **SETTINGS)
    assert all(len(row) == 3 for row in one) and counts["sampled"] >= 9
    assert len({answer for row in one for answer in row}) > 3
    for batch_size in (1, 9):
        assert make(model, chat, PAIRS, **SETTINGS | {"batch_size": batch_size})[0] == one
    assert make(model, chat, PAIRS, **SETTINGS | {"seed": 1})[0] != one
    # more alternates leave the first ones as they were
    more, _ = make(model, chat, PAIRS, **SETTINGS | {"repeats": 4, "tries": 1})
    first, _ = make(model, chat, PAIRS, **SETTINGS | {"repeats": 3, "tries": 1})
    assert [row[:1] for row in more] == [row[:1] for row in first]


def test_what_cannot_be_used_is_asked_for_again(monkeypatch, chat):
    asked = says(
        monkeypatch,
        ["  One. ", "ONE.", "ana", "", None, "At sea", "a", "b", "c"],
        ["Two.", " one. ", "In  oslo", "By the lake"],
        ["Three.", "At home"],
    )
    rows, counts = make(None, chat, PAIRS, **SETTINGS | {"tries": 3})
    assert rows == [["One.", "Two.", "Three."], ["At sea", "By the lake", "At home"],
                    ["a", "b", "c"]]  # fmt: skip
    assert counts["sampled"] == 15
    assert counts["rejected"] == {
        "repeated": 2, "original": 2, "empty": 1, "unfinished": 1,
    }  # fmt: skip
    assert counts["rows_that_repeat"] == counts["rows_of_refusals"] == 0
    assert asked[0][:4] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]
    assert asked[1:] == [[(0, 0, 3), (0, 0, 4), (0, 1, 3), (0, 1, 4)], [(0, 0, 5), (0, 1, 5)]]


def test_rows_that_stay_short_are_filled_and_counted(monkeypatch, chat, caplog):
    says(monkeypatch, ["x", "y", "Ana", None, "", "in oslo", "a", "b", "c"], ["y", *[None] * 3])
    rows, counts = make(None, chat, PAIRS, **SETTINGS)
    refusals = resources.files("unlora.data").joinpath("refusals.txt").read_text().splitlines()
    assert rows[0] == ["x", "y", "x"] and rows[2] == ["a", "b", "c"]
    assert len(set(rows[1])) == 3 and set(rows[1]) <= set(refusals)
    assert (counts["filled_by_repeating"], counts["filled_with_refusals"]) == (1, 3)
    assert (counts["rows_that_repeat"], counts["rows_of_refusals"]) == (1, 1)
    assert "1 of 3 questions have fewer than 3 different alternates" in caplog.text


def test_a_model_that_only_knows_the_answer_is_one_sentence(monkeypatch, chat):
    answers = [pair.answer for pair in PAIRS for _ in range(3)]
    says(monkeypatch, answers, answers)
    with pytest.raises(InputError, match="None of the 18 answers can be used: 18 original. Raise"):
        make(None, chat, PAIRS, **SETTINGS)


def test_a_request_is_filled_in_one_go(monkeypatch, chat):
    prompts = []
    monkeypatch.setattr(
        "unlora.evals.passes.generate", lambda model, p, *a, **k: prompts.extend(p) or ["x"]
    )
    pair = Pair("Is {answer} a word?", "{question}")
    make(None, chat, [pair], **SETTINGS | {"prompt": "{question} Not: {answer}", "repeats": 1})
    assert chat.tokenizer.decode(prompts[0]).count("Is {answer} a word? Not: {question}") == 1
    prompts.clear()
    make(None, chat, [pair], **SETTINGS | {"repeats": 1})
    assert prompts == [chat.prompt("Is {answer} a word?")]


def test_rows_are_those_of_an_unlearning_run_in_its_order(tmp_path, chat):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    rows = [{"q": "Who?", "a": ["Ana", "Silva"]}, {"q": "When?", "a": 1984}], [
        {"q": "Where?", "a": "Oslo"}]  # fmt: skip
    for file, lines in zip(files, rows, strict=True):
        file.write_text("\n".join(map(json.dumps, lines)))
    forget = {
        file.stem: {"handler": "QADataset", "args": {
            "hf_args": {"path": str(file)}, "question_key": "q", "answer_key": "a"}}
        for file in files
    }  # fmt: skip
    found = read_pairs(forget, None)
    assert found == [Pair("Who?", "Ana"), Pair("Who?", "Silva"), Pair("When?", "1984"),
                     Pair("Where?", "Oslo")]  # fmt: skip
    encoded = load_parts({"forget": forget}, chat, ("forget",), seed=0).rows["forget"]
    assert [row.input_ids for row in encoded] == [
        chat.encode(pair.question, pair.answer).input_ids for pair in found
    ]


@pytest.mark.slow
def test_from_the_command_line_to_a_step_of_altpo(folder):
    start = ("model.model_args.pretrained_model_name_or_path=root", *SMALL)
    settings = ("alternates.max_new_tokens=100", "alternates.repeats=2", "task_name=mine")
    words = [POCKET, *start, *settings, "alternates.voice=model", "alternates.top_p=1.0"]
    # capsys closes what Hydra's log handler goes on writing to
    with redirect_stdout(StringIO()) as out:
        launch(alternate_answers.run, "alternates", words)
    file = folder / "saves" / "alternates" / "mine" / "alternates.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    forget = load_rows("pocket", "forget01")
    assert [(row["question"], row["original"]) for row in rows] == [
        (row["question"], row["answer"]) for row in forget
    ]
    assert all(len(row["answer"]) == 2 and row["original"] not in row["answer"] for row in rows)
    manifest = json.loads(file.with_name("manifest.json").read_text())
    assert (manifest["rows"], manifest["alternates"]) == (len(forget), 2 * len(forget))
    assert manifest["sampled"] >= 2 * len(forget) - manifest["filled_with_refusals"]
    assert file.with_name("run_config.json").is_file()
    assert not list(file.parent.glob("*.tmp"))

    printed = out.getvalue()
    assert str(file.relative_to(folder)) in printed
    words = printed.split("unlora unlearn ")[1].split()
    assert words.pop(0) == "experiment=..." and not any(word[0] in "~+" for word in words)
    cfg = composed("unlearn", POCKET, *start, *words, "trainer.args.max_steps=2",
                   "trainer.args.learning_rate=1e-3", "trainer.args.disable_tqdm=true",
                   "data.forget.POCKET_QA_forget.args.max_length=512",
                   "task_name=altpo")  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    cfg.eval = {}
    train.run(cfg)
    trained = json.loads((folder / "saves/unlearn/altpo/manifest.json").read_text())
    assert trained["data"]["alternate"]["rows"] == 2 * len(forget)
    assert trained["optimiser_steps"] == 2

    # the same number of answers, but to other questions
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows[:0:-1]]))
    with pytest.raises(InputError, match="Row 2 of data.alternate answers another question"):
        train.run(cfg)


@pytest.mark.slow
def test_the_root_answers_with_the_adapters_off(folder):
    finetune = composed("train", "experiment=finetune/pocket/lora", *SMALL[:1], *SMALL[2:],
                        "model.model_args.pretrained_model_name_or_path=root", "task_name=full",
                        "trainer.args.max_steps=4", "trainer.args.disable_tqdm=true",
                        "trainer.args.learning_rate=1e-2")  # fmt: skip
    OmegaConf.set_struct(finetune, False)
    finetune.eval = {}
    train.run(finetune)

    def written(name, path, voice):
        weights = f"model.model_args.pretrained_model_name_or_path={path}"
        alternate_answers.run(composed("alternates", POCKET, *SMALL, weights, f"task_name={name}",
                                f"alternates.voice={voice}", "alternates.max_new_tokens=100",
                                "alternates.repeats=1"))  # fmt: skip
        return (folder / "saves" / "alternates" / name / "alternates.jsonl").read_text()

    of_root = written("a", "saves/finetune/full", "root")
    assert of_root == written("b", "root", "model")
    assert of_root != written("c", "saves/finetune/full", "model")
    with pytest.raises(InputError, match="no adapters that could be switched off"):
        written("d", "root", "root")


@pytest.mark.slow
def test_it_composes_what_unlearning_composes():
    unlearn, ours = (OmegaConf.load(f"{CONFIGS}/{name}.yaml") for name in ("unlearn", "alternates"))
    assert ours.defaults == unlearn.defaults
    config = read(composed("alternates", "experiment=unlearn/tofu/lora", "trainer=AltPO",
                           "forget_split=forget05", "task_name=mine"))  # fmt: skip
    assert config.paths.output_dir == "./saves/alternates/mine"
    assert config.data["forget"]["TOFU_QA_forget"]["args"]["hf_args"]["name"] == "forget05"
    assert set(config.alternates) == set(AlternatesKeys.__annotations__)
    # what pocket says about alternates stands in its experiment, and unlearning accepts it
    assert read(composed("alternates", POCKET)).alternates["prompt"] is None
    assert read(composed("unlearn", POCKET)).alternates["prompt"] is None


TOFU = "experiment=unlearn/tofu/lora"
WRONG = {
    "no questions": ("experiment=unlearn/wmdp/lora data.forget.WMDP_forget.args.hf_args.path=x.txt",
                     "Data set WMDP_forget: it is running text"),
    "no forget data": (f"{POCKET} data.forget=null", "data.forget is not set."),
    "no such file": (f"{TOFU} data.forget.TOFU_QA_forget.args.hf_args.path=x.json", "'x.json'"),
    "no such column": (f"{POCKET} data.forget.POCKET_QA_forget.args.answer_key=anwser",
                       "no column 'anwser'; it has: question, answer"),
    "none wanted": (f"{POCKET} alternates.repeats=0", "alternates.repeats is 0; it must be"),
    "no tries": (f"{POCKET} alternates.tries=0", "alternates.tries is 0;"),
    "text for a number": (f"{POCKET} alternates.temperature=hot", "it must be a number."),
    "temperature 0": (f"{POCKET} alternates.temperature=0", "it must be greater than 0"),
    "top_p above 1": (f"{POCKET} alternates.top_p=1.5", "it must be less than or equal to 1"),
    "unknown key": (f"{POCKET} alternates.repaets=3", "Did you mean 'repeats'?"),
    "unknown section": (f"{POCKET} alternate.repeats=3", "Did you mean 'alternates'?"),
    "unknown voice": (f"{POCKET} alternates.voice=roots", "Did you mean 'root'?"),
    "prompt without question": (f"{POCKET} alternates.prompt=Invent", "it must hold {question}"),
    "unknown name in prompt": (POCKET + " alternates.prompt='{question}{anwser}'",
                               "Did you mean 'answer'?"),
    "foreign experiment": ("experiment=finetune/tofu/lora", "--config-name=train"),
    "unknown experiment": ("experiment=unlearn/tofu/lroa", "Did you mean 'unlearn/tofu/lora'?"),
}  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("typed, said", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence(typed, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("Running text.")
    with pytest.raises(SystemExit) as left:
        launch(alternate_answers.run, "alternates", typed.split())
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "saves").exists()


def test_the_command_explains_itself(capsys):
    main(["alternates", "--help"])
    said = capsys.readouterr().out
    assert "unlora alternates experiment=unlearn/tofu/lora" in said
    assert (
        "alternates.repeats=5" in said
        and "experiment=finetune/" not in said
        and "trainer.args" not in said
    )
