"""What the pages tell users to type is understood, and the tutorial works."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny

from unlora.cli import main, overrides
from unlora.cli.compose import composed
from unlora.config import read

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
STARTS = ("unlora", "python", "torchrun", "accelerate")
FILES = ("forget.jsonl", "retain.jsonl", "retain.csv", "facts.jsonl", "holdout.jsonl")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
AUDITS = ("audit", "dial")
HELPERS = (
    *AUDITS,
    "who-saw",
    "forget",
    "verify",
    "rollback",
    "export",
    "fetch-model",
    "push",
    "doctor",
    "chat",
    "report",
    "completion",
    "--help",
)


def blocks(text: str) -> list[str]:
    """The blocks of a page that are commands: those without a language."""
    fences = re.findall(r"^(```[a-z]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for fence, block in fences if fence == "```"]


def commands(text: str) -> list[list[str]]:
    """The commands of a page, as words; those with an ellipsis are no whole commands."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in STARTS and "..." not in line:
                found.append(words)
    inline = re.findall(r"`(unlora \w+ [^`]*?)`", text.replace("\n", " "))
    return found + [shlex.split(words) for words in inline if "..." not in words and "=" in words]


ALL = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES
       for words in commands(page.read_text("utf-8"))]  # fmt: skip


def config_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The config that a command runs, and its overrides; None where it runs none."""
    if words[0] == "unlora":
        return None if words[1] in HELPERS else (words[1], words[2:])
    script = next((i for i, word in enumerate(words) if word.startswith("src/")), None)
    if script is None:
        return None
    rest = words[script + 1 :]
    named = [word.partition("=")[2] for word in rest if word.startswith("--config-name=")]
    rest = [word for word in rest if not word.startswith("--config-name=")]
    return (named or [Path(words[script]).stem])[0], rest


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).write_text("")
    Path("my-model").mkdir()
    return tmp_path


def test_the_pages_have_commands():
    assert len(ALL) > 40 and {"docs/tutorial.md", "docs/migration.md"} <= {page for page, _ in ALL}


def test_every_command_names_what_there_is():
    for page, words in ALL:
        name, rest = config_of(words) or ("", [])
        assert name or words[0] != "unlora" or words[1] in HELPERS, f"{page}: {words}"
        assert not name or name in overrides.EXPERIMENTS, f"{page}: {words}"
        for group, _, choice in (word.lstrip("@").partition("=") for word in rest):
            known = overrides.choices(group, name, []) if group in ("experiment", "trainer") else ()
            assert not known or choice in (*known, "ChanceLevel"), f"{page}: {group}={choice}"


def test_every_audit_composes():
    audits = [words[2:] for _, words in ALL if words[0] == "unlora" and words[1] in AUDITS]
    assert len(audits) > 4
    for words in audits:
        pairs = zip(["", *words], words, strict=False)
        composed("audit", [word for flag, word in pairs if "=" in word and flag != "--to"])


@pytest.mark.slow
@pytest.mark.parametrize("page, words", ALL, ids=[f"{p}: {' '.join(w)[:60]}" for p, w in ALL])
def test_every_command_composes(page, words, files):
    asked = config_of(words)
    if asked is None:
        return
    name, rest = asked
    rest = [re.sub(r"(=)(FILE|MODEL)$", r"\1forget.jsonl", word) for word in rest]
    if "trainer=ChanceLevel" in rest:  # made by its page, whose own test follows it
        return
    args = (
        overrides.with_own_data(overrides.normalised(rest))
        if name == "eval"
        else overrides.normalised(rest)
    )
    cfg = composed(name, [word for word in args if not word.startswith("--")])
    if name != "study":
        read(cfg)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links {target}"


@pytest.mark.parametrize("wanted", ["GGUF", "vLLM", "fewer rows", "without evaluation"])
def test_what_users_look_for_stands_in_the_list_of_pages_and_on_its_page(wanted):
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    (line,) = (line for line in index.splitlines() if wanted in line)
    page = ROOT / "docs" / re.search(r"\]\(([^)]+)\)", line)[1]
    assert re.search(rf"^## .*{wanted}", page.read_text("utf-8"), re.MULTILINE | re.IGNORECASE)


def test_the_tutorial_checks_the_target_before_anything_is_forgotten():
    words = [config_of(words) for words in commands(TUTORIAL)]
    kinds = [(found[0], *found[1]) for found in words if found]
    asked = [i for i, one in enumerate(kinds) if "model=saves/finetune/full" in one]
    assert [kinds[i][0] for i in asked] == ["eval", "unlearn"]
    assert "train" not in [one[0] for one in kinds[asked[0] :]]


@pytest.mark.slow
def test_the_tutorial_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = tiny.llama(max_position_embeddings=2048)
    network.lm_head.weight.data[tiny.tokenizer().eos_token_id] *= 3  # its answers are brief
    network.save_pretrained("my-model")
    tiny.tokenizer().save_pretrained("my-model")
    for name, rows in zip(("forget", "retain"), re.findall(r"```json\n(.*?)```", TUTORIAL, re.S),
                          strict=True):  # fmt: skip
        Path(f"{name}.jsonl").write_text(rows)
    for block in blocks(TUTORIAL):
        for line in block.strip().splitlines():
            if line.startswith("unlora "):
                main.main(shlex.split(line)[1:])
            else:
                subprocess.run(line, shell=True, check=True)
    assert "npo" in Path("saves/report/report.html").read_text()
    log = json.loads(Path("saves/unlearn/npo/evals/OWN_EVAL.json").read_text())
    again = json.loads(Path("saves/eval/eval_npo/OWN_EVAL.json").read_text())
    for name in ("forget_Q_A_Prob", "retain_Q_A_Prob"):
        assert log[name]["agg_value"] == pytest.approx(again[name]["agg_value"], abs=1e-6)
    assert len(Path("facts.jsonl").read_text().splitlines()) == 4
    exported = Path("saves/unlearn/npo/exported")
    assert {file.name for file in exported.iterdir()} == {"merged", "adapter"}
