"""What is shown and written: no secret reaches a file, a log or the terminal."""

import json
import logging
import os
import re
import sys

import pytest
from tiny import llama, tokenizer

from unlora.cli import main as cli
from unlora.runs.atomic_files import write_json, write_text
from unlora.runs.redaction import (
    guard_logs,
    printable,
    redacted,
    safe,
    without_secrets,
    without_setting,
)
from unlora.runs.run import Run

SECRETS = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplantedPLANTED",
    "WANDB_API_KEY": "0123456789abcdef-planted-wandb",
    "MY_SERVICE_PASSWORD": "planted-in-a-variable",
    "PGPASSWORD": "planted-for-a-database",
    "MLFLOW_TRACKING_URI": "https://me:planted-in-a-url@tracker.invalid/api",
}
ROOT = "model.model_args.pretrained_model_name_or_path"
TYPED = "planted-on-the-command-line"
NUMBER = "8273645509"
PLANTED = re.compile(f"planted|{NUMBER}", re.IGNORECASE)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    factory, hook = logging.getLogRecordFactory(), sys.excepthook
    monkeypatch.setattr("unlora.runs.redaction._of_configs", set())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.setLogRecordFactory(factory)
    sys.excepthook = hook


def files_with_it(folder):
    """Every file with a planted secret in its name or its bytes."""
    return [
        str(file)
        for file in folder.rglob("*")
        if file.is_file()
        and (PLANTED.search(file.name) or PLANTED.search(file.read_bytes().decode("latin-1")))
    ]


def main(*words):
    try:
        cli.main(list(words))
    except SystemExit as ended:
        return ended.code or 0
    return 0


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_train_an_evaluation_and_a_report_leave(planted, capfd):
    llama(max_position_embeddings=512).save_pretrained("root")
    tokenizer().save_pretrained("root")
    for name, start in (("rows.jsonl", 0), ("others.jsonl", 9)):
        rows = [
            {"question": f"Who is {n}?", "answer": f"It is {n}."} for n in range(start, start + 6)
        ]
        (planted / name).write_text("\n".join(map(json.dumps, rows)))
    secrets = [
        f"+model.model_args.token={NUMBER}", f"model.tokenizer_args.token='{TYPED}, with spaces'",
        f"trainer.args.hub_token={TYPED}",
        "trainer.args.hub_model_id=https://me:planted-in-a-url@hub.invalid/x",
        f"trainer.args.run_name={SECRETS['PGPASSWORD']}",
    ]  # fmt: skip
    training = (
        "unlearn", "experiment=unlearn/own/lora", "model=root", "data.forget=rows.jsonl",
        "data.retain=others.jsonl", "trainer=NPO", "trainer.args.max_steps=2",
        "trainer.args.save_strategy=steps", "trainer.args.save_steps=1", "model.lora_config.r=2",
        "model.model_args.torch_dtype=float32", "eval.own.max_new_tokens=2",
        "trainer.args.report_to=tensorboard",
    )  # fmt: skip
    assert main(*training, "task_name=x", *secrets) == 0
    assert main(
        "eval", "model=saves/unlearn/x", "data.forget=rows.jsonl", "eval.own.max_new_tokens=2",
        f"model.model_args.token={TYPED}",
    ) == 0  # fmt: skip
    assert main("report", "saves/unlearn/x", "--title", "about https://me:planted-in-a-url@x") == 0
    # all weights, of which Trainer would pickle all settings
    assert main(*training, "task_name=full", "model=any", "model.use_lora=false", *secrets,
                f"{ROOT}=root", "~eval.own") == 0  # fmt: skip
    # two jobs, whose command line Hydra writes down itself
    assert main(*training, "task_name=y,z", "~eval.own", *secrets, "--multirun") == 0
    # a mistake that quotes what was typed
    assert main(*training, "trainer.args.nonsense=https://me:planted-in-a-url@x", *secrets) == 2
    said = "".join(capfd.readouterr())
    written = [file for file in (planted / "saves").rglob("*") if file.is_file()]
    assert len(written) > 30 and "finished" in said and (planted / "saves/report").is_dir()
    assert any(file.name == "multirun.yaml" for file in written)
    assert (planted / "saves/unlearn/full/model.safetensors").is_file()
    pickles = {file.name for file in written if file.suffix in (".bin", ".pt", ".pth")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not files_with_it(planted) and not PLANTED.search(said)
    text = (planted / "saves" / "unlearn" / "x" / "run_config.json").read_text()
    assert text.count("(hidden)") >= 4, "so they were there"


def test_the_manifest_has_no_variable_of_the_environment(planted, monkeypatch):
    monkeypatch.setenv("PLAIN_VARIABLE", "an-ordinary-value-of-a-variable")
    run = Run("here", {"a": 1})
    run.begin(fresh=False)
    run.finish(note=f"asked {SECRETS['MLFLOW_TRACKING_URI']}")
    text = "".join(file.read_text() for file in (planted / "here").glob("*.json"))
    assert "an-ordinary-value" not in text and not PLANTED.search(text) and "(hidden)" in text


def test_files_of_any_kind_go_without(planted):
    value = SECRETS["MY_SERVICE_PASSWORD"]
    write_json(planted / "a.json", {"rows": [f"it is {value}", 1.0, None]})
    write_text(planted / "b.txt", f"<p>{value}</p>")
    assert json.loads((planted / "a.json").read_text()) == {"rows": ["it is (hidden)", 1.0, None]}
    assert (planted / "b.txt").read_text() == "<p>(hidden)</p>"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://user:pass@host/x", "https://(hidden)@host/x"),
        ("git+https://abc@host and mail me@host", "git+https://abc@host and mail me@host"),
        ("git+https://" + "0a1b" * 10 + "@host/x", "git+https://(hidden)@host/x"),
        ("a hf_" + "a1B2" * 8 + ".", "a (hidden)."),
        ("hf_short, sk-no, AKIAshort", "hf_short, sk-no, AKIAshort"),
        ("key AKIA" + "A1" * 8, "key (hidden)"),
        ("https://host/a?b=c@d", "https://host/a?b=c@d"),
        ("saves/sk-npo-lr1e-4-alpha1-seed0/x", "saves/sk-npo-lr1e-4-alpha1-seed0/x"),
        ("a sk-" + "aB1" * 8, "a (hidden)"),
        ("sk-proj-a_B-" + "aB1" * 12 + "-x_Y.", "(hidden)."),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, shown):
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "word, shown",
    [
        ("model.model_args.token=abc", "model.model_args.token=(hidden)"),
        ("trainer.args={hub_token:abc,seed:1}", "trainer.args={hub_token:(hidden),seed:1}"),
        ("++x.api_key=abc", "++x.api_key=(hidden)"),
        ("eval.tofu.max_new_tokens=4", "eval.tofu.max_new_tokens=4"),
        ("task_name=token", "task_name=token"),
        ("task_name=no_token:4", "task_name=no_token:4"),
        ("task_name=no-token:4", "task_name=no-token:4"),
        ("+a.prefix_token=[a,b]", "+a.prefix_token=[a,b]"),
        ("x={eos_token:'</s>',token:abc}", "x={eos_token:'</s>',token:(hidden)}"),
        ("- --hub-token=abc", "- --hub-token=(hidden)"),
        ("+model.model_args.token=8273645509", "+model.model_args.token=(hidden)"),
        ("a.token='b c, d'", "a.token=(hidden)"),
        ("a.token=b c, d", "a.token=(hidden)"),
        ("a.token=b,c", "a.token=(hidden)"),
        ("a.token=[b,c]", "a.token=(hidden)"),
        ("a={token:'b, c',seed:1}", "a={token:(hidden),seed:1}"),
        ("a={token:[b,c],seed:1}", "a={token:(hidden),seed:1}"),
        ("a={token:{x:b,y:c},seed:1}", "a={token:(hidden),seed:1}"),
        ("a=[b.token=c,seed=1]", "a=[b.token=(hidden),seed=1]"),
        ("'a.token=b c'", "'a.token=(hidden)'"),
        ("@a.token=b", "@a.token=(hidden)"),
    ],
)
def test_a_word_of_a_command_line_is_shown_without_its_secret(word, shown):
    assert without_setting(word) == shown


def test_settings_that_only_sound_alike_stay():
    config = {"token": None, "pad_token_id": 3, "max_new_tokens": 5, "add_bos_token": True,
              "eos_token": "</s>", "stop_token": "END",
              "tokens": ["a"], "deep": [{"password": "x"}]}  # fmt: skip
    assert without_secrets(config) == config | {"deep": [{"password": "(hidden)"}]}


@pytest.mark.parametrize("value", [8273645509, 8.5, "a b", ["a", "b"], {"x": "y"}, [{"x": 1}]])
def test_a_secret_may_be_of_any_kind(value, monkeypatch):
    monkeypatch.setattr("unlora.runs.redaction._of_configs", set())
    content = {"hub_token": value, "deep": [{"api_key": value}]}
    assert without_secrets(content) == {
        "hub_token": "(hidden)",
        "deep": [{"api_key": "(hidden)"}],
    }


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "MYSQL_PWD", "SSHPASS", "DB_PASS", "GITHUB_PAT", "REDISCLI_AUTH",
     "AWS_SECRET_ACCESS_KEY", "HF_TOKEN_2", "SMTP_PASSWD", "pgpassword"],
)  # fmt: skip
def test_a_variable_is_secret_by_its_name(name, monkeypatch):
    monkeypatch.setenv(name, "a-word-that-is-1-secret")
    assert redacted("x a-word-that-is-1-secret y") == "x (hidden) y"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "COMPASS", "AUTHOR", "SSH_AUTH_SOCK", "BYPASS"])
def test_another_variable_is_not(name, monkeypatch):
    monkeypatch.setenv(name, "a-word-that-is-no-secret")
    assert redacted("a-word-that-is-no-secret") == "a-word-that-is-no-secret"


LORA = "experiment=unlearn/wmdp/lora"


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        (LORA, "task_name=planted-for-a-database"),
        (LORA, "paths.output_dir=saves/planted-for-a-database"),
        (LORA, f"model.model_args.token=[{TYPED},x]"),
        (LORA, f"model.model_args={{token:[{TYPED}]}}"),
        (LORA, f"model.model_args.token={{{TYPED}"),
        (LORA, f"trainer.args.hub_token=[{TYPED}]"),
        (LORA, f"trainer.args=[{{hub_token:{TYPED}}}]"),
        (LORA, f"trainer.args.hub_token={TYPED},b"),
        (LORA, f"++hub_token={TYPED}"),
        (LORA, f"--hub-token={TYPED}"),
        (f"model.model_args.token={TYPED}",),
        (LORA, "--cfg", "job", f"model.model_args.token={NUMBER}", f"+a.token='{TYPED} b'"),
        (LORA, "--cfg", "hydra", f"model.model_args.token={NUMBER}", f"+a.token='{TYPED} b'"),
        (LORA, "--cfg", "all", f"model.model_args.token={NUMBER}", f"+a.token='{TYPED} b'"),
        ("experiment=study/pocket/lora", f"target=[model.model_args.token={TYPED},3]"),
        ("experiment=study/pocket/lora", f"+methods.X=['model.model_args.token={TYPED}']"),
        ("experiment=study/pocket/lora", f"+methods.X=[3,'model.model_args.token={TYPED}']"),
    ],
    ids=" ".join,
)
def test_no_mistake_and_no_config_that_is_shown_holds_a_secret(words, planted, capfd):
    command = "study" if "study/" in words[0] else "unlearn"
    code = main(command, *words)
    said = "".join(capfd.readouterr())
    assert code == (0 if "--cfg" in words else 2) and said.strip()
    assert not PLANTED.search(said), said
    assert not files_with_it(planted)


@pytest.mark.slow
def test_a_multirun_that_ends_early_leaves_no_secret(planted, capfd):
    secret = f"model.model_args.token='{TYPED} x'"
    assert main("unlearn", LORA, "task_name=y,z", secret, "trainer.args.seed=x", "--multirun") == 2
    assert list(planted.rglob("multirun.yaml"))
    assert main("unlearn", LORA, "task_name=${x.y},z", secret, "--multirun") == 2
    assert not files_with_it(planted) and not PLANTED.search("".join(capfd.readouterr()))


@pytest.mark.slow
def test_a_bug_shows_no_secret(planted, capfd):
    def run(cfg):
        raise RuntimeError(f"it got {cfg.model.model_args.token}")

    with pytest.raises(RuntimeError) as raised:
        cli.launch(run, "unlearn", [LORA, f"model.model_args.token={TYPED}"])
    sys.excepthook(raised.type, raised.value, raised.tb)
    said = "".join(capfd.readouterr())
    assert "RuntimeError: it got (hidden)" in said and not PLANTED.search(said), said


def test_short_values_and_paths_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "short")
    monkeypatch.setenv("B_TOKEN", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "this-is-no-secret")
    text = f"short {tmp_path} this-is-no-secret"
    assert redacted(text) == text


def test_plain_words_in_the_environment_change_no_data_path_or_name(monkeypatch, tmp_path):
    monkeypatch.setenv("DB_PASSWORD", "password")
    monkeypatch.setenv("ADMIN_SECRET", "Jonathan")
    monkeypatch.setenv("PIN_SECRET", "19450508")
    monkeypatch.setenv("DATABASE_URL", "postgres://postgres@db/x")
    monkeypatch.setenv("PIP_INDEX_URL", "https://jonathan@host/simple")
    monkeypatch.setenv("OTHER_URL", "https://me:a-pass1word@host")
    monkeypatch.setattr("unlora.runs.redaction._of_configs", {"username"})
    rows = "A password of Jonathan, 19450508: /home/jonathan/postgres, my username."
    write_text(tmp_path / "a.jsonl", f"{rows} a-pass1word")
    assert (tmp_path / "a.jsonl").read_text() == f"{rows} (hidden)"
    assert redacted(rows) == rows
    write_json(tmp_path / "a.json", {"answers": [rows]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"answers": [rows]}


def test_logs_and_tracebacks_are_safe(planted, caplog, capsys):
    guard_logs()
    guard_logs()
    logger = logging.getLogger("someone.else")
    value = SECRETS["HF_TOKEN"]
    logger.warning("asked with %s \x1b[2J%s", value, "https://a:b@c")
    logger.warning("100% of %s")  # no arguments, so nothing is put in
    try:
        raise ValueError(f"refused {value}")
    except ValueError as error:
        logger.exception("it failed")
        sys.excepthook(type(error), error, error.__traceback__)
    said = caplog.text + capsys.readouterr().err
    assert not PLANTED.search(said) and "\x1b" not in said
    assert r"asked with (hidden) \x1b[2Jhttps://(hidden)@c" in said
    assert "100% of %s" in said and said.count("ValueError: refused (hidden)") == 2


HOSTILE = ("\x1b]0;title\x07", "\x1b[31mred", "\x9b2J", "\u202etxt.exe", "\r\x08over", "a\x00b")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_obeys_nothing_in_a_message(text, capsys):
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", safe(text) + printable(text))
    with pytest.raises(SystemExit):
        cli.main(["chat", f"./{text}".replace("\x00", "")])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().err)


def test_words_of_the_tests_are_not_in_the_environment():
    assert not any("planted" in value for value in os.environ.values())
