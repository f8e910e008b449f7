"""Models and folders that are wrong, through the entry points: one sentence, and nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import transformers
from bad_files import EVAL, UNLEARN, make_models, refuse_weights, refused, write_good_files
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

ROOT, ADAPTER = "root/model.safetensors", "run/adapter_model.safetensors"
AGAIN = "Download or copy (it|them|those|the two)"


def edit(file, **changed):
    """Change entries of a JSON file."""
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changed))


def overwrite(file, start, content):
    """Change bytes of a file."""
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[:start] + content + whole[start + len(content) :])


def cut(file, left):
    Path(file).write_bytes(Path(file).read_bytes()[:left])


def without(file, part):
    """Take the tensors away whose names hold ``part``."""
    kept = {name: x for name, x in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


def with_nan(file):
    weights = load_file(file)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def foreign(folder="run", **changed):
    """Leave the adapter, and nothing of ours that says where it comes from."""
    Path(folder, "lineage.json").unlink()
    edit(f"{folder}/adapter_config.json", **{"base_model_name_or_path": "root", **changed})


def sharded(change):
    """The root model in several files, one of which is changed."""
    tiny.llama(max_position_embeddings=512).save_pretrained("root", max_shard_size="50KB")
    Path(ROOT).unlink()
    change(sorted(Path("root").glob("model-*"))[1])


def adapter_on(model):
    """The adapter, on another model than its own."""
    model.save_pretrained("other")
    tiny.tokenizer().save_pretrained("other")
    foreign(base_model_name_or_path="other")


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=300))


def cycle():
    foreign(base_model_name_or_path="second")
    foreign("second", base_model_name_or_path="run")


def gone(folder):
    """Move a folder away, and forget where it was given."""
    shutil.move(folder, "elsewhere")
    for file in ("run/lineage.json", "second/lineage.json"):
        if Path(file).is_file():
            root = json.loads(Path(file).read_text())["root"]
            edit(file, root=root | {"given": "/nowhere"})


def small_vocabulary():
    tiny.llama(vocab_size=100).save_pretrained("root")


# model -> what is done to its files, and what is said
BEFORE_WEIGHTS = {
    "weights are cut short": ("root", lambda: cut(ROOT, -100), f"{ROOT}' are damaged .* {AGAIN}"),
    "weights are cut in the header": ("root", lambda: cut(ROOT, 400), f"are damaged .* {AGAIN}"),
    "weights have no header": ("root", lambda: overwrite(ROOT, 8, b"x" * 40), "are damaged"),
    "weights have a huge header": ("root", lambda: overwrite(ROOT, 0, b"\xff" * 8), "are damaged"),
    "weights are empty": ("root", lambda: cut(ROOT, 0), "are damaged .*too small"),
    "weights are a pointer": (
        "root", lambda: Path(ROOT).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "pointer of Git LFS and not the weights. Run `git lfs pull`"),
    "a shard is missing": ("root", lambda: sharded(os.remove),
                           "'root' lacks model-00002-of-.*: 1 of the .* files"),
    "a shard is cut short": ("root", lambda: sharded(lambda file: cut(file, -9)), "2.* damaged"),
    "the index is half written": (
        "root", lambda: Path("root/model.safetensors.index.json").write_text("{"), AGAIN),
    "no config": ("root", lambda: os.remove("root/config.json"), "'root' holds no model: neither"),
    "a config that is cut": ("root", lambda: cut("root/config.json", 50), "not a valid JSON file"),
    "an empty config": ("root", lambda: Path("root/config.json").write_text("{}"), "Unrecognized"),
    "an unknown architecture": ("root", lambda: edit("root/config.json", model_type="mamba9"),
                                r"does not know. Install a newer one \(pip install -U"),
    "a config of wrong types": ("root", lambda: edit("root/config.json", hidden_size="big"),
                                "expected int, got str"),
    "a config whose heads do not divide": (
        "root", lambda: edit("root/config.json", num_attention_heads=5), "not a multiple"),
    "an adapter that is cut": ("run", lambda: cut(ADAPTER, -9), f"{ADAPTER}' are damaged"),
    "an adapter without weights": ("run", lambda: os.remove(ADAPTER), "not there. Put the folder"),
    "an adapter for another architecture": (
        "run", lambda: adapter_on(gpt2()), "does not fit .* none of its modules is in a gpt2"),
    "an adapter for a larger model": (
        "run", lambda: adapter_on(tiny.llama(hidden_size=64)),
        "has 32 inputs at model.layers.0.self_attn.q_proj, the model 64. Give the model that"),
    "an adapter of another rank": ("run", lambda: foreign(r=7), "have rank 2, but .* says r=7"),
    "an adapter of another kind": ("run", lambda: foreign(peft_type="IA3"), "'IA3'; only LORA"),
    "an adapter of nothing": ("run", lambda: (foreign(), without(ADAPTER, "lora")), "no LoRA w"),
    "an adapter without a base": ("run", lambda: foreign(base_model_name_or_path=None),
                                  "names no base model. Write its path"),
    "adapters in a circle": ("run", cycle, "names itself as its base model, or one that stands on"),
    "an adapter config of rubbish": (
        "run", lambda: Path("run/adapter_config.json").write_bytes(b"\xff"), "holds no settings"),
    "a vocabulary larger than the embedding": (
        "root", small_vocabulary, "ids up to 260, but .* has 100 embeddings. Give the tokenizer"),
    "no tokenizer": ("root", lambda: [x.unlink() for x in Path("root").glob("*token*")],
                     "the folder has none of tokenizer.json, .*Set model.tokenizer_args"),
    "a tokenizer that is cut": ("root", lambda: cut("root/tokenizer.json", 99), "No tokenizer"),
    "a tokenizer of rubbish": ("root", lambda: Path("root/tokenizer.json").write_text("{}"),
                               "No tokenizer could be loaded from 'root'"),
    "a chat template that is broken": (
        "root", lambda: Path("root/chat_template.jinja").write_text("{% for m in %}"),
        "chat template of the tokenizer 'root' cannot be used .* Use another tokenizer, or set"),
    "a chat template that refuses": (
        "root", lambda: Path("root/chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        r"used \(no\). Use another tokenizer"),
    "a chat template without the question": (
        "root", lambda: Path("root/chat_template.jinja").write_text("Hello!"),
        "leaves out what the user says"),
    "a root that is gone": ("run", lambda: gone("root"), "of 'run' is not there: neither"),
    "a link that is gone": ("second", lambda: gone("run"), "adapter_model.* which is not there"),
    "a root that has changed": ("second", lambda: edit("root/config.json", rms_norm_eps=0.1),
                                "root model 'root' has changed since 'second' was trained"),
    "a link that has changed": ("second", lambda: with_nan(ADAPTER), "its sha256 has changed"),
    "a lineage that is cut": ("run", lambda: cut("run/lineage.json", 30), "not a lineage .* Put"),
    "a lineage of another shape": ("run", lambda: Path("run/lineage.json").write_text("[1]"),
                                   "is not a lineage"),
    "a lineage that is binary": ("run", lambda: Path("run/lineage.json").write_bytes(b"\xff"),
                                 "is not a lineage"),
    "a lineage that is nested too deep": (
        "run", lambda: Path("run/lineage.json").write_text("[" * 100_000), "is not a lineage"),
    "a run config that is cut": ("run", lambda: Path("run/run_config.json").write_text("{"),
                                 "does not say how this model was trained .* Give the template"),
    "an empty folder": ("void", lambda: os.mkdir("void"), "'void' holds no model"),
    "a file for a folder": ("./root/config.json", lambda: None, "There is no folder"),
}  # fmt: skip

NEEDS_TRANSFORMERS_5 = ("a config of wrong types", "a config whose heads do not divide")
# what only the weights themselves show
WITH_WEIGHTS = {
    "no weights": ("root", lambda: os.remove(ROOT), "has no weights that are safetensors"),
    "weights are of another size": ("root", lambda: edit("root/config.json", intermediate_size=52),
                                    "have other shapes than its config.json says"),
    "a layer is missing": ("root", lambda: without(ROOT, "layers.1.mlp.up"),
                           "has no weights for model.layers.1.mlp.up_proj.weight: 1 that"),
    "an encoder": ("root", lambda: edit("root/config.json", model_type="t5"), "no causal language"),
    "an adapter lacks a layer": ("run", lambda: (foreign(), without(ADAPTER, "layers.1")),
                                 "lacks weights of modules that its adapter_config.json names"),
    "an adapter holds NaN": ("run", lambda: (foreign(), with_nan(ADAPTER)), "NaN or infinity"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    """A folder of one's own with copies of the models; paths of a lineage are relative."""
    place = shutil.copytree(models, tmp_path / "here")
    write_good_files(place)
    monkeypatch.chdir(place)
    return place


def command(request, cases):
    """One and the other, in turn: both read models in one place."""
    return (UNLEARN, EVAL)[list(cases).index(request.node.callspec.id) % 2]


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("model, spoil, expected", BEFORE_WEIGHTS.values(), ids=BEFORE_WEIGHTS)
def test_what_is_wrong_with_a_model_is_said_before_its_weights_are_read(
    capsys, monkeypatch, request, model, spoil, expected
):
    if transformers.__version__ < "5" and request.node.callspec.id in NEEDS_TRANSFORMERS_5:
        pytest.skip("transformers 4 does not look at the values of a config")
    spoil()
    refuse_weights(monkeypatch)
    words = [*command(request, BEFORE_WEIGHTS), f"model={model}"]
    refused(words, expected, capsys, monkeypatch)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("words", [UNLEARN, EVAL], ids=["unlearn", "eval"])
@pytest.mark.parametrize("model, spoil, expected", WITH_WEIGHTS.values(), ids=WITH_WEIGHTS)
def test_weights_that_do_not_make_the_model_are_refused(
    capsys, monkeypatch, words, model, spoil, expected
):
    spoil()
    refused([*words, f"model={model}"], expected, capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("~eval",)], ids=["evaluated", "~eval"])
def test_nothing_is_asked_of_or_trained_on_weights_that_answer_with_nan(capsys, monkeypatch, words):
    with_nan(ROOT)
    monkeypatch.setattr(
        "unlora.recipes.baselines.evaluation.evaluation_is_pure",
        lambda _: pytest.fail("it was loaded"),
    )
    words = [*UNLEARN, "model=root", *words]
    said = "'root' answers with NaN .* set .*torch_dtype=float32"
    refused(words, said, capsys, monkeypatch)
