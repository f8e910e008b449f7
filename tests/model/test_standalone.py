"""What an export holds: the adapters' effect in any dtype, and what is trained beside LoRA."""

import json
import logging
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from plain_adapters import edit, make_adapter, make_root
from tiny import LORA, llama, tokenizer
from transformers import AutoModelForCausalLM

from unlora.cli.main import main
from unlora.errors import GuardError, InputError
from unlora.model.attach import load_model
from unlora.model.guards import saved_equals_trained, start_equals_target
from unlora.model.lineage import Lineage
from unlora.model.lora import LoRAModelForCausalLM, save_adapter
from unlora.model.merge import share_left_by_rounding
from unlora.model.probe import Probe, in_float32
from unlora.model.standalone import export


@pytest.fixture
def adapter(tmp_path):
    """Makes an adapter on a root that it makes."""

    def make(dtype=torch.float32, scale=1.0, tied=False, **config):
        root = make_root(tmp_path / "root", llama(tied=tied, dtype=dtype))
        folder = make_adapter(root, tmp_path / "ad", **config)
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["lora_alpha"] *= scale
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        tokenizer().save_pretrained(folder)
        return folder

    return make


def answers_of(folder):
    return Probe.of(load_model(Lineage.read(str(folder)), {"dtype": "auto"})[0])


def test_a_model_is_asked_as_if_its_weights_were_float32():
    """Otherwise a deep one differs from itself by more than many adapters change."""
    model, ids = llama(dtype=torch.bfloat16, num_hidden_layers=8), torch.arange(40)[None] * 7
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        rounded = model(input_ids=ids).logits.float()
        with in_float32(model):
            exact = model(input_ids=ids).logits
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])
        truth = model.float()(input_ids=ids).logits
    assert exact.dtype == torch.float32 and (rounded - truth).abs().max() > 0.01
    assert (exact - truth).abs().max() < 1e-4


def test_what_is_left_of_an_adapter_in_bfloat16_is_said(adapter, tmp_path, caplog):
    folder = adapter(torch.bfloat16, scale=0.3)
    with caplog.at_level(logging.INFO):
        merged = export(str(folder), "merged")
    said = next(r.getMessage() for r in caplog.records if "is left" in r.getMessage())
    assert "% of what the adapters do is left" in said and "--dtype float32" in caplog.text
    assert "is left" in (merged / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_an_adapter_that_bfloat16_would_round_away_is_not_written_in_it(adapter):
    folder = adapter(torch.bfloat16, scale=0.002)
    said = answers_of(folder)
    with pytest.raises(GuardError, match=r"hold \d+% of what the adapters do.*--dtype float32"):
        export(str(folder), "merged")
    assert not (folder / "exported").exists() or not any((folder / "exported").iterdir())
    exact = AutoModelForCausalLM.from_pretrained(export(str(folder), "merged", dtype="float32"))
    seen = said.compared(exact)
    assert exact.dtype == torch.float32 and seen.share == pytest.approx(1, abs=0.01)
    plain = AutoModelForCausalLM.from_pretrained(folder.parent / "root")
    kept = PeftModel.from_pretrained(plain, export(str(folder), "adapter"))
    assert said.difference(kept)[0] < 1e-5


def test_a_float32_model_can_be_exported_in_bfloat16(adapter, tmp_path):
    folder = adapter(scale=4)
    out = export(str(folder), "merged", str(tmp_path / "out"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_training_starts_at_an_adapter_that_a_merge_would_round_away(adapter, caplog):
    folder = adapter(torch.bfloat16, scale=0.002)
    said = answers_of(folder)
    with caplog.at_level(logging.INFO):
        model = LoRAModelForCausalLM.from_pretrained(str(folder), LORA)
    assert "stay beside the new one" in caplog.text
    assert said.difference(model)[0] < 1e-5 and start_equals_target(model, model.target)
    merged = LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage="merge")
    with pytest.raises(GuardError, match=r"\d+% of what the adapters do.*lineage=stack"):
        start_equals_target(merged, merged.target)


def test_an_adapter_that_outlasts_rounding_is_merged_as_before(adapter, caplog):
    folder = adapter(torch.bfloat16, scale=8)
    model = LoRAModelForCausalLM.from_pretrained(str(folder), LORA)
    assert list(model.peft_config) == ["default"]
    assert start_equals_target(model, model.target)


def test_the_share_left_by_rounding_is_that_of_the_weights(adapter):
    for scale, expected in ((8, (0.95, 1.01)), (0.002, (0, 0.5))):
        folder = adapter(torch.bfloat16, scale=scale)
        share = share_left_by_rounding(load_model(Lineage.read(str(folder)), {"dtype": "auto"})[0])
        assert expected[0] <= share <= expected[1]
        shutil.rmtree(folder)


@pytest.mark.default_cases(2)
@pytest.mark.filterwarnings("ignore:.*(tie_word|tied|Cannot|offline|Setting `save_emb)")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "kind",
    [
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [5, 298, 299], "target_modules": ["q_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
    ],
    ids=lambda kind: next(iter(kind)) + str(next(iter(kind.values()))),
)
def test_what_is_trained_beside_lora_becomes_full_weights_as_peft_has_it(adapter, kind, tied):
    folder = adapter(tied=tied, **kind)
    with pytest.raises(InputError, match="unlora export .* --merged"):
        Lineage.read(str(folder))
    plain = AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
    ids = torch.cat([torch.arange(290, 300), torch.arange(20) * 7])[None]
    try:
        merged = AutoModelForCausalLM.from_pretrained(export(str(folder), "merged"))
    except GuardError:
        pytest.skip("refused: peft cannot merge it")
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - plain(input_ids=ids).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:.*(tie_word|tied|Setting `save_emb)")
def test_an_adapter_with_new_tokens_becomes_full_weights(tmp_path):
    root = make_root(tmp_path / "root")
    model = AutoModelForCausalLM.from_pretrained(root)
    model.resize_token_embeddings(304)
    from peft import LoraConfig, get_peft_model

    both = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **both}))
    for weight in adapted.parameters():
        weight.data += 0.05 * weight.requires_grad
    adapted.save_pretrained(str(tmp_path / "ad"))
    tokens = tokenizer()
    tokens.save_pretrained(tmp_path / "ad")
    merged = AutoModelForCausalLM.from_pretrained(export(str(tmp_path / "ad"), "merged"))
    ids = torch.arange(290, 304)[None]
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - adapted.eval()(input_ids=ids).logits
    assert merged.config.vocab_size == 304 and difference.abs().max() < 1e-4


def test_an_adapter_on_a_tied_head_says_who_does_not_read_it(adapter, caplog):
    folder = adapter(tied=True)
    with caplog.at_level(logging.WARNING):
        out = export(str(folder), "adapter")
    card = (out / "README.md").read_text()
    assert "lm_eval" in caplog.text and "lm_eval" in card and "llama.cpp" in card
    merged = export(str(folder), "merged")
    assert "weights of its own" in (merged / "README.md").read_text()


def test_an_adapter_beside_the_head_has_no_such_note(adapter, caplog):
    folder = adapter(tied=True, target_modules=["q_proj"])
    out = export(str(folder), "adapter")
    assert "lm_eval" not in caplog.text + (out / "README.md").read_text()
    assert "weights of its own" not in (export(str(folder), "merged") / "README.md").read_text()


JOINED = {
    "plain": {},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "down_proj": 7},
                            "alpha_pattern": {"v_proj": 20}},
    "other modules": {"target_modules": ["k_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}  # fmt: skip


@pytest.mark.default_cases(2)
@pytest.mark.filterwarnings("ignore:.*(tied|tie_word)")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", JOINED)
def test_joined_adapters_have_no_more_ranks_than_the_answers_need(adapter, caplog, name, tied):
    """The second and third link learn in the direction of the first, as later requests may."""
    if tied and name == "embedding":
        pytest.skip("an adapter on an embedding that is the head, too, is refused")
    links = [adapter(tied=tied, **JOINED[name])]
    for number in (2, 3):
        copy = shutil.copytree(links[0], links[0].with_name(f"ad{number}"))
        edit(copy, base_model_name_or_path=str(links[-1]))
        links.append(copy)
    whole = answers_of(links[-1])
    with caplog.at_level(logging.INFO):
        out = export(str(links[-1]), "adapter")
    settings = json.loads((out / "adapter_config.json").read_text())
    rank = 7 if "patterns" in name else 4
    assert settings["r"] == settings["lora_alpha"] <= rank and not settings["use_rslora"]
    assert f"rank {3 * rank} are one of rank {settings['r']}" in caplog.text
    assert f"of rank {3 * rank}" in (out / "README.md").read_text()
    root = AutoModelForCausalLM.from_pretrained(links[0].parent / "root")
    seen = whole.compared(PeftModel.from_pretrained(root, out))
    assert seen.relative < 1e-3 and seen.error < 0.01


def test_what_was_saved_is_read_back_and_compared(tmp_path):
    root = make_root(tmp_path / "root")
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    for name, weight in model.named_parameters():
        weight.data += 0.1 * ("lora_B" in name)
    (tmp_path / "run").mkdir()
    save_adapter(model, tmp_path / "run")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert "0.00e+00" in saved_equals_trained(model, tmp_path / "run")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), state) and list(model.peft_config) == ["default"]
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(GuardError, match="saved equals trained: .*holds another model"):
        saved_equals_trained(model, tmp_path / "run")


REFUSED = {
    "no form": (["export", "ad"], "In which form"),
    "both forms": (["export", "ad", "--merged", "--adapter"], "In which form"),
    "no run": (["export", "nothing", "--merged"], "no run folder 'nothing'"),
    "an unknown dtype": (["export", "ad", "--merged", "--dtype", "flaot32"], "Did you mean"),
    "a dtype for an adapter": (["export", "ad", "--adapter", "--dtype", "float32"], "of merged"),
    "a base that is not there": (["export", "ad", "--merged", "--base", "./gone"], "no such fold"),
    "a base that is no model": (["export", "ad", "--merged", "--base", "empty"], "holds no model"),
    "a base for a full model": (["export", "root", "--merged", "--base", "root"], "is no folder"),
    "a base of another size": (["export", "ad", "--adapter", "--base", "wide"], "does not fit"),
    "an adapter as its own base": (["export", "ad", "--merged", "--base", "ad"], "names itself"),
    "the root": (["export", "root", "--merged"], "has no adapter to export"),
    "a folder that is not empty": (["export", "ad", "--merged", "--output", "root"], "not empty"),
    "a file in its place": (["export", "ad", "--merged", "--output", "file"], "made or written"),
    "a file above it": (["export", "ad", "--merged", "--output", "file/out"], "made or written"),
    "an unknown word": (["export", "ad", "--merged", "--dype", "float32"], "cannot use '--dype'"),
    "a dtype left out": (["export", "ad", "--merged", "--dtype"], "expected one argument"),
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_adapter(make_root(folder / "root"), folder / "ad")
    llama(hidden_size=64).save_pretrained(folder / "wide")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_export_is_one_sentence(workplace, monkeypatch, name):
    words, expected = REFUSED[name]
    said = []
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("unlora.cli.main._say", lambda error: said.append(str(error)))
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and len(said) == 1 and "\n" not in said[0]
    assert expected in said[0], said[0]
    assert not any((workplace / "ad").glob("exported/*"))
