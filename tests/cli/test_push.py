"""``unlora push``: weights, tokenizer and card go to the hub; logs, rows and links stay."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from unlora.cli.main import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with three exports, and private files beside the weights."""
    monkeypatch.chdir(tmp_path)
    served = Path("run/exported/serve")
    for form, weights in (("adapter", "adapter_model"), ("merged", "model"), ("gguf", "model")):
        folder = served / form
        folder.mkdir(parents=True)
        (folder / f"{weights}.{'gguf' if form == 'gguf' else 'safetensors'}").write_bytes(b"1" * 99)
        for name in ("README.md", "TOFU_EVAL.json", "eval_config.json", "row_hashes.npz"):
            (folder / name).write_text("secret row")
    settings = {"base_model_name_or_path": "owner/root"}
    (served / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (served / "merged" / "tokenizer.json").symlink_to("/etc/hostname")
    return served


def test_a_dry_run_lists_what_would_go(run, capsys):
    main(["push", "run", "owner/name", "--form", "merged", "--dry-run"])
    said = capsys.readouterr().out
    assert "  model.safetensors  0.0 MiB" in said and "  README.md  " in said
    for name in ("TOFU_EVAL.json", "eval_config.json", "row_hashes.npz", "tokenizer.json"):
        assert f"  {name} stays here" in said
    assert said.endswith("Nothing was uploaded.\n")


def test_nothing_else_is_uploaded(run, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, **given):
            calls.append((name, given))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **given):
            calls.append(given)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    main(["push", str(run / "adapter"), "owner/name", "--private"])
    assert calls[0] == ("owner/name", {"private": True, "exist_ok": True})
    assert sorted(calls[1]["allow_patterns"]) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert "https://huggingface.co/owner/name" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["run"], "What, and where to?"),
    (["run", "owner/name"], "holds adapter, merged, gguf. Say which: --form adapter"),
    (["run", "owner/name", "--form", "onnx"], "invalid choice"),
    (["nowhere", "owner/name"], "There is no folder 'nowhere'"),
    (["empty", "owner/name"], "holds no export. Type: unlora export empty --serve"),
    (["run", "a/b/c", "--form", "merged"], "is no repository"),
    (["run", "owner/name", "--fast"], "cannot use '--fast'"),
    (["trained", "owner/name"], "holds no export"),
    (["local", "owner/name", "--form", "adapter"], "which nobody else has"),
    (["run", "owner/name", "--form", "merged"], "no token of the hub. Run: hf auth login"),
])  # fmt: skip
def test_wrong_words_end_in_one_sentence(run, monkeypatch, capsys, words, said):
    def create_repo(self, *_, **__):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    Path("empty").mkdir()
    Path("trained").mkdir()  # a run itself is no export
    for name in ("model.safetensors", "run_config.json"):
        Path("trained", name).touch()
    Path("local/exported/adapter").mkdir(parents=True)
    settings = {"base_model_name_or_path": str(Path("root").resolve())}
    Path("local/exported/adapter/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as ended:
        main(["push", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err
