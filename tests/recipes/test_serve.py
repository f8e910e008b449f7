"""``unlora export RUN --serve``: forms that say what the run says, or are refused."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from plain_adapters import make_adapter, make_root
from safetensors.torch import load_file
from tiny import llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlora.cli.main import main
from unlora.errors import InputError
from unlora.model.gguf_export import ADAPTER, MODEL, convert, converters
from unlora.model.lineage import Lineage
from unlora.model.probe import answers
from unlora.recipes.model_card import model_card
from unlora.recipes.serve_guard import Figures, ServeGuard
from unlora.results.audit_log import AuditLog

LLAMA_CPP = os.environ.get("UNLORA_LLAMA_CPP")
TINY = Path(os.environ.get("UNLORA_REALDATA", "nowhere"), "tiny_lm", "stories260K", "hf")
IDS = torch.arange(3, 19)[None]
CONVERTER = """import sys
from pathlib import Path
words = sys.argv[1:]
if "--outfile" not in words or {fails}:
    sys.exit("ERROR: BPE pre-tokenizer was not recognized")
Path(words[words.index("--outfile") + 1]).write_text(" ".join(words))
"""


def llama_cpp(folder, *, fails=False):
    """A checkout of llama.cpp whose converters only write down how they were called."""
    folder.mkdir()
    for name in (MODEL, ADAPTER):
        (folder / name).write_text(CONVERTER.format(fails=fails))
    return folder


def export(*words):
    main(["export", "ad", "--serve", *map(str, words)])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes an adapter; nobody knows which rows it was trained on."""
    monkeypatch.chdir(tmp_path)

    def make(**config):
        make_adapter(make_root("root", llama()), Path("ad"), **config)
        return tmp_path / "ad" / "exported" / "serve"

    return make


def test_every_form_says_what_the_run_says(made, tmp_path, capsys):
    served = made(r=8, use_rslora=True, target_modules=["q_proj", "up_proj"])
    export("--rank", 8, "--llama-cpp", llama_cpp(tmp_path / "cpp"))
    said = capsys.readouterr().out
    assert "No rows to compare by, so logits alone decide" in said
    assert "rank 8 -> 8: 0.0% of the change" in said and "--max-lora-rank 8 " in said
    assert "bfloat16 rounds" in said and "ollama create ad -f " in said
    run = answers(AutoPeftModelForCausalLM.from_pretrained("ad"), IDS)
    assert (answers(AutoModelForCausalLM.from_pretrained("root"), IDS) - run).abs().max() > 1
    adapter = AutoPeftModelForCausalLM.from_pretrained(served / "adapter")
    torch.testing.assert_close(answers(adapter, IDS), run, atol=1e-4, rtol=1e-4)
    settings = json.loads((served / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 8 and not settings["use_rslora"]
    merged = AutoModelForCausalLM.from_pretrained(served / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert (answers(merged, IDS) - run).abs().max() < 0.3
    words = (served / "gguf" / "lora.gguf").read_text()
    assert f"--base {tmp_path / 'root'}" in words
    assert "--outtype bf16" in (served / "gguf" / "model.gguf").read_text()
    assert "FROM ./model.gguf" in (served / "gguf" / "Modelfile").read_text()
    card = ModelCard.load(served / "adapter" / "README.md")
    assert card.data.library_name == "peft" and "unlora" in card.data.tags


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="needs UNLORA_LLAMA_CPP, a checkout of llama.cpp")
@pytest.mark.skipif(not TINY.is_dir(), reason="needs UNLORA_REALDATA")
def test_the_real_converters_lose_nothing(tmp_path, monkeypatch):
    """rsLoRA's scale included; the model is a real one, whose head is its embedding."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "root")
    targets = ["q_proj", "o_proj", "down_proj"]
    make_adapter("root", Path("ad"), r=16, use_rslora=True, target_modules=targets)
    export("--llama-cpp", LLAMA_CPP)
    served = tmp_path / "ad" / "exported" / "serve"
    ours = AutoModelForCausalLM.from_pretrained(served / "merged", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        served / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    assert torch.equal(answers(theirs, IDS), answers(ours, IDS))
    reader = gguf.GGUFReader(served / "gguf" / "lora.gguf")
    assert float(reader.fields["adapter.lora.alpha"].parts[-1][0]) == 16  # a scale of 1
    assert len(reader.tensors) == len(load_file(served / "adapter" / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="needs UNLORA_LLAMA_CPP, a checkout of llama.cpp")
@pytest.mark.skipif(not TINY.is_dir(), reason="needs UNLORA_REALDATA")
def test_llama_cpp_writes_what_ours_writes(tmp_path, monkeypatch):
    """By a build of llama.cpp from the package index, the merged model and root with adapter."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp==2026.10.11549")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "root")
    make_adapter("root", Path("ad"), r=16, use_rslora=True, target_modules=["q_proj", "o_proj"])
    export("--llama-cpp", LLAMA_CPP)
    served = tmp_path / "ad" / "exported" / "serve"
    convert(Path(LLAMA_CPP, MODEL), Path("root"), tmp_path / "root.gguf")
    tokenizer = AutoTokenizer.from_pretrained("root")

    def theirs(gguf, lora=None):
        params = llama_cpp.CommonParams()
        params.model.path, params.n_ctx = str(gguf), 256
        if lora:
            params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        asked = {"prompt": ids, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        return llama_cpp.Server(params).handle_completions(asked)["choices"][0]["text"]

    ids = tokenizer("Once upon a time").input_ids
    ours = {}
    for name, source, load in (
        ("merged", served / "merged", AutoModelForCausalLM),
        ("root", "root", AutoModelForCausalLM),
        ("adapter", served / "adapter", AutoPeftModelForCausalLM),
    ):
        model = load.from_pretrained(source, dtype=torch.float32)
        written = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
        ours[name] = tokenizer.decode(written[0, len(ids) :])
    assert ours["root"] != ours["merged"]
    assert theirs(served / "gguf" / "model.gguf").strip() == ours["merged"].strip()
    assert theirs(tmp_path / "root.gguf").strip() == ours["root"].strip()
    with_lora = theirs(tmp_path / "root.gguf", served / "gguf" / "lora.gguf")
    assert with_lora.strip() == ours["adapter"].strip()


def test_an_adapter_that_needs_its_head_is_refused_and_weights_are_written(made, capsys):
    served = made(r=4, target_modules=["q_proj", "lm_head"], alpha_pattern={"lm_head": 80})
    export()
    said = capsys.readouterr().out
    assert "adapter: REFUSED, not written" in said and "train without lm_head" in said
    assert not (served / "adapter").exists() and (served / "merged").is_dir()
    assert "--enable-lora" not in said and "vllm serve" in said
    written = json.loads((served / "serve.json").read_text())
    assert written["forms"]["adapter"]["refused"] and not written["forms"]["merged"]["refused"]


def test_a_converter_that_fails_is_quoted(tmp_path):
    scripts = converters(str(llama_cpp(tmp_path / "cpp", fails=True)))
    with pytest.raises(InputError, match="failed: ERROR: BPE pre-tokenizer was not recognized"):
        convert(scripts[MODEL], tmp_path, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "package, way_out",
    [("sentencepiece", "Type: pip install 'unlora[gguf]'"), ("nonesuch", "Install it beside unlo")],
)
def test_a_package_that_a_converter_lacks_is_told_from_other_faults(tmp_path, package, way_out):
    script = tmp_path / MODEL
    lacks = f"No module named '{package}.inner'"
    script.write_text(f'raise ModuleNotFoundError("{lacks}") from ImportError()\n')
    missing = f"failed: ModuleNotFoundError: {lacks}. {way_out}"
    with pytest.raises(InputError, match=re.escape(missing)):
        convert(script, tmp_path, tmp_path / "x.gguf")


def test_converters_are_found_on_path(tmp_path, monkeypatch):
    folder = llama_cpp(tmp_path / "cpp")
    monkeypatch.setenv("PATH", str(folder))
    assert not converters(None)
    for file in folder.iterdir():
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    assert set(converters(None)) == {MODEL, ADAPTER}
    convert(converters(None)[ADAPTER], tmp_path, tmp_path / "x.gguf", base="root")
    assert "--base root" in (tmp_path / "x.gguf").read_text()


@pytest.mark.parametrize("words, said", [
    (["--rank", "0"], "--rank is 0; it must be from 1 to 512"),
    (["--rank", "ten"], "invalid int value"),
    (["--dtype", "float16"], "--serve writes bfloat16"),
    (["--merged"], "In which form?"),
    (["--llama-cpp", "empty"], "holds no convert_hf_to_gguf.py"),
    (["--output", "root"], "is not empty"),
    (["--base", "./gone"], "no such folder"),
    (["--fast"], "cannot use '--fast'"),
    (["attacks=all"], "attacks"),
])  # fmt: skip
def test_wrong_words_end_in_one_sentence(made, capsys, words, said):
    made(r=2)
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        export(*words)
    wrong = capsys.readouterr().err
    assert ended.value.code == 2 and said in wrong
    assert not Path("ad", "exported", "serve").exists()


def test_rank_and_converters_belong_to_serve(made, capsys):
    made(r=2)
    with pytest.raises(SystemExit):
        main(["export", "ad", "--merged", "--rank", "8"])
    assert "belong to --serve" in capsys.readouterr().err


def guard(verdict="held", bound=0.15):
    """A guard that knows of an audit: target -1, retain model -3, unlearned model -2.9 nats."""
    plain = {"name": "plain", "attack": "plain", "residual": 0.05, "interval95": [0.0, 0.1],
             "means": {"unlearned": -2.9, "target": -1.0, "retain": -3.0}}  # fmt: skip
    content = {
        "verdict": {"name": verdict, "sentence": "It holds."}, "attacks": [plain],
        "held": {"value": 0.1, "interval95": [0.05, bound]},
        "thresholds": {"known": 0.1, "hidden": 0.2, "over_forgotten": -0.1},
        "retain_probability": {"target": 0.9},
    }  # fmt: skip
    made = object.__new__(ServeGuard)
    made.audit = AuditLog(content)
    return made


BEFORE = Figures(forget=0.05, retain=0.8, score=-2.9)


@pytest.mark.parametrize("after, why", [
    (BEFORE, None),
    (Figures(0.05, 0.79, -2.95), None),
    (Figures(0.05, 0.7, -2.9), "the retain answers fall from 0.800 to 0.700"),
    (Figures(0.05, float("nan"), -2.9), "the retain answers fall"),
    (Figures(0.05, 0.8, -2.9, frozenset([3])), "the answers of 1 forget rows word for word"),
    (Figures(0.06, 0.8, -2.7), "the verdict 'held' would be 'known'"),  # 0.05 -> 0.15
    (Figures(0.01, 0.8, -3.4), "the verdict 'held' would be 'over-forgotten'"),  # -0.2
    (Figures(0.2, 0.8, -2.85), "the forget answers rise from 0.050 to 0.200"),
])  # fmt: skip
def test_a_form_is_refused_where_the_verdict_or_the_answers_change(after, why):
    refused = guard().why_refused(BEFORE, after)
    assert refused is None if why is None else refused.startswith(why) or why in refused


def test_what_attacks_bring_back_moves_with_what_is_there_plainly():
    after = Figures(0.05, 0.8, -2.85)  # 0.05 -> 0.075
    assert guard(bound=0.15).why_refused(BEFORE, after) is None
    assert "would be 'hidden'" in guard(bound=0.19).why_refused(BEFORE, after)
    assert guard("known").why_refused(BEFORE, Figures(0.06, 0.8, -2.5)) is None  # it was known
    unscored = guard()
    unscored.audit.attacks[0]["means"]["unlearned"] = None
    assert unscored.why_refused(BEFORE, Figures(0.06, 0.8, -2.5)) is None
    other_rows = Figures(0.05, 0.8, -2.0)
    assert guard().why_refused(other_rows, Figures(0.06, 0.8, -1.0)) is None


def test_a_card_holds_figures_and_the_verdict_and_no_row():
    lineage = Lineage("owner/root")
    figures = Figures(0.05, 0.8, -2.9, frozenset([1]))
    text = model_card(lineage, "adapter", "rank 128 -> 64", figures, guard().audit)
    card = ModelCard(text)
    assert card.data.base_model == "owner/root" and card.data.base_model_relation == "adapter"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["forget probability"] == 0.05 and values["plain residual"] == 0.05
    assert "It holds." in text and "rank 128 -> 64" in text and "## Limits" in text
    plain = model_card(lineage, "merged", "nothing", Figures(), None)
    assert "fine-tuned" in plain and "not audited" in plain and "model-index" not in plain
