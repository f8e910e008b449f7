"""Models and runs that someone else made: no code of theirs runs, and no path leads elsewhere.

Each pickle and each module here would write a file, ``bait``, when it is read.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tiny import adapted, llama, tokenizer

from unlora.cli import main
from unlora.config.resolve import model_section
from unlora.data.chat_encoding import Chat
from unlora.errors import InputError
from unlora.evals.passes.text_classifier import fluency_prob
from unlora.evals.result_cache import ResultCache
from unlora.model import get_model, load_tokenizer, resolve_model
from unlora.model.lineage import Lineage
from unlora.recipes.run_history import start_of
from unlora.report.run_roles import entries_of, read_study
from unlora.results.run_result import read_records
from unlora.runs.safe_loading import near, read_mapping, refuse_pickle
from unlora.trainer.arguments import training_arguments
from unlora.trainer.checkpoints import checkpoint_to_resume


class Bait:
    """Unpickled, it touches a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def bait(tmp_path):
    file = tmp_path / "bait"
    yield file
    assert not file.exists(), "code of someone else was run"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and a tokenizer as they are saved; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "root"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "root"))


@pytest.fixture
def run(model, tmp_path):
    """A run folder whose adapter stands on the model beside it."""
    folder = tmp_path / "run"
    adapted(target_modules=["q_proj"]).save_pretrained(folder, save_embedding_layers=False)
    tokenizer().save_pretrained(folder)
    root = Lineage.read(str(model))
    from unlora.model.lineage import fingerprint

    Lineage(str(model), fingerprint=fingerprint(str(model))).write(folder)
    assert Lineage.read(str(folder)).root and not root.links
    return folder


def section(path, **args):
    return model_section({"model_args": {"pretrained_model_name_or_path": str(path), **args}})


def load(path, **args):
    return get_model(section(path, **args), trainable=False)


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def pickled(file, bait):
    """A pickle in the format of torch, and one of Python alone beside it, that would touch bait."""
    torch.save({"model.norm.weight": Bait(bait)}, file)
    return file


def test_the_bait_works(tmp_path):
    file, bait = tmp_path / "weights.bin", tmp_path / "bait"
    torch.load(pickled(file, bait), weights_only=False)
    assert bait.exists(), "so a test would see that it was read"
    file.write_bytes(pickle.dumps(Bait(tmp_path / "again")))
    pickle.loads(file.read_bytes())
    assert (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "x.ckpt", "m.pth"]
)
def test_a_pickled_model_is_refused_with_how_to_convert_it(model, bait, name):
    (model / "model.safetensors").unlink()
    pickled(model / name, bait)
    how = "from_pretrained" if name == "pytorch_model.bin" else "safetensors.torch.save_file"
    with pytest.raises(InputError, match=rf"pickled and are not read.*{how}"):
        load(model)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_converted_as_the_sentence_says(tmp_path, tied, parts):
    folder, whole = tmp_path / "root", llama(tied=tied)
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = whole.state_dict()
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        of = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(weights)}
        for file in set(of.values()):
            torch.save({key: weights[key] for key in weights if of[key] == file}, folder / file)
        edit(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=of)
    with pytest.raises(InputError) as refused:
        load(folder)
    how = re.search(r"with (transformers\..*?), or take", str(refused.value))[1]
    eval(how, {"transformers": transformers})
    found = load(folder)[0].state_dict()
    assert set(found) == set(weights) and all(torch.equal(found[k], weights[k]) for k in weights)


def test_an_adapter_is_converted_as_the_sentence_says(run, model):
    (run / "lineage.json").unlink()  # one that peft has saved
    edit(run / "adapter_config.json", base_model_name_or_path=str(model))
    weights = safetensors.torch.load_file(run / "adapter_model.safetensors")
    torch.save(weights, run / "adapter_model.bin")
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError) as refused:
        load(run)
    read, write = re.search(
        r"with (torch\.load.*?) and (safetensors.*?), or", str(refused.value)
    ).groups()
    names = {"torch": torch, "safetensors": safetensors}
    eval(write, names | {"WEIGHTS": eval(read, names)})
    load(run)


def test_a_pickle_beside_safetensors_is_not_read(model, bait):
    pickled(model / "pytorch_model.bin", bait)
    load(model)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../elsewhere.safetensors", "/etc/x.safetensors", "sub/a.safetensors"],
)
def test_an_index_names_safetensors_in_its_own_folder_alone(model, bait, name):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    pickled(model / "pytorch_model.bin", bait)
    index = model / "model.safetensors.index.json"
    edit(index, metadata={}, weight_map={"model.norm.weight": name})
    with pytest.raises(InputError, match=r"index.json' names .* nothing but \.safetensors"):
        load(model)
    edit(index, weight_map=[1])
    with pytest.raises(InputError, match="has no weight_map"):
        load(model)


def test_a_repository_with_pickles_alone_is_refused(model, bait, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--evil" / "snapshots" / ("a" * 40)
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", bait)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    with pytest.raises(InputError) as caught:
        load("someone/evil", cache_dir=str(tmp_path / "hub"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [True, False])
def test_a_pickled_adapter_is_refused(run, bait, kept):
    pickled(run / "adapter_model.bin", bait)
    if kept:
        load(run)  # beside the safetensors nobody looks at it
        return
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model.bin' are pickled.*safetensors"):
        load(run)


def test_safetensors_cannot_be_switched_off(model):
    with pytest.raises(InputError, match="use_safetensors is False: weights that are pickled can"):
        section(model, use_safetensors=False)


def test_a_pickled_classifier_is_refused(model, bait):
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", bait)
    with pytest.raises(InputError, match="pickled"):
        fluency_prob(str(model), ["A text."])


def test_a_pickle_in_the_kept_answers_is_not_read(tmp_path, bait):
    kept = ResultCache(tmp_path)
    kept.write("ab" * 32, {"x": np.zeros(2)})
    file = next(tmp_path.glob("*/*.answers"))
    import hashlib
    import io

    stream = io.BytesIO()
    np.savez(stream, x=np.array([Bait(bait)], dtype=object))
    content = stream.getvalue()
    file.write_bytes(hashlib.sha256(content).digest() + content)  # even with the right hash
    assert kept.read("ab" * 32) is None


# --- checkpoints ---------------------------------------------------------------------------------


def resume(folder, lineage=None):
    args = training_arguments(
        {"report_to": "none", "resume_from_checkpoint": str(folder)},
        output_dir=str(folder.parent),
    )
    # their maker can write any hashes; here there are none
    return checkpoint_to_resume(args, lineage or Lineage("tiny"), unchecked=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A run of two steps and its checkpoint."""
    from small_trainer import small_trainer

    small_trainer(tmp_path / "mine", max_steps=2, save_strategy="steps", save_steps=1).train()
    return tmp_path / "mine" / "checkpoint-1"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_foreign_checkpoint_holds_numbers_alone(checkpoint, bait, name):
    from small_trainer import small_trainer

    trainer = small_trainer(checkpoint.parent, max_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))  # as it was written it goes on
    torch.save({"state": Bait(bait)}, checkpoint / name)
    trainer = small_trainer(checkpoint.parent, max_steps=2)
    with pytest.raises(InputError, match="more than tensors and numbers in its optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_pickled_weights_of_a_checkpoint_are_refused(tmp_path, bait):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    edit(folder / "trainer_state.json", global_step=1)
    assert resume(folder) == str(folder)
    pickled(folder / "pytorch_model.bin", bait)
    with pytest.raises(InputError, match="pickled"):
        resume(folder)


def test_the_best_checkpoint_is_one_of_the_same_run(tmp_path):
    folder, other = tmp_path / "mine" / "checkpoint-1", tmp_path / "other" / "checkpoint-9"
    for one in (folder, other, folder.parent / "checkpoint-2"):
        one.mkdir(parents=True)
    for best in (None, str(folder), str(folder.parent / "checkpoint-2"), "moved/checkpoint-1"):
        edit(folder / "trainer_state.json", global_step=1, best_model_checkpoint=best)
        assert resume(folder) == str(folder)
    for best in (str(other), str(folder / ".." / ".." / "other" / "checkpoint-9")):
        edit(folder / "trainer_state.json", best_model_checkpoint=best)
        with pytest.raises(InputError, match="which is not beside it"):
            resume(folder)
    (folder.parent / "checkpoint-9").mkdir()
    edit(folder.parent / "checkpoint-9" / "trainer_state.json", global_step=9)  # of a copied run
    assert resume(folder) == str(folder)


# --- code beside a model -------------------------------------------------------------------------


@pytest.fixture
def with_code(model, bait):
    """A model of a kind of its own, whose module touches the bait."""
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        text = f"open({str(bait)!r}, 'w')\nclass Evil: pass\n"
        (model / f"{module}.py").write_text(text)
    return model


def test_the_code_of_a_model_is_not_run_unless_asked_for(with_code):
    edit(with_code / "config.json", model_type="evil", auto_map={
        "AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"
    })  # fmt: skip
    said = r"code of its own \(auto_map in its config.json\).*model_args.trust_remote_code=true"
    with pytest.raises(InputError, match=said):
        load(with_code)
    with pytest.raises(InputError, match=said):
        load_tokenizer(resolve_model(section(with_code)))


def test_a_model_that_transformers_knows_is_loaded_without_its_code(with_code):
    edit(with_code / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    load(with_code)


def test_the_code_of_a_tokenizer_is_not_run(with_code):
    edit(with_code / "tokenizer_config.json", tokenizer_class="Evil", auto_map={
        "AutoTokenizer": ["tokenization_evil.Evil", None]
    })  # fmt: skip
    try:
        load_tokenizer(resolve_model(section(with_code)))
    except InputError as error:
        assert "trust_remote_code" in str(error)  # or transformers' own class is taken


def test_it_is_run_where_it_is_asked_for(with_code, tmp_path, monkeypatch):
    """So the tests above would see it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(with_code / "config.json", model_type="evil", auto_map={
        "AutoConfig": "configuration_evil.Evil"
    })  # fmt: skip
    with pytest.raises(Exception, match="Evil|from_dict|model_type|from_pretrained"):
        load(with_code, trust_remote_code=True)
    assert (tmp_path / "bait").exists()
    (tmp_path / "bait").unlink()


def test_a_foreign_run_cannot_ask_for_code(run, with_code):
    edit(run / "run_config.json", model={
        "model_args": {"pretrained_model_name_or_path": "x", "trust_remote_code": True},
        "template_args": {"apply_chat_template": True},
    })  # fmt: skip
    found = resolve_model(section(run).model_copy(update={"as_trained": True})).section
    assert "trust_remote_code" not in found.model_args
    assert "trust_remote_code" not in found.tokenizer_args


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}", "{% x %}",
     "{{ messages.__init__.__globals__ }}", "{{ (lipsum or cycler).__globals__.os }}"],
)  # fmt: skip
def test_a_chat_template_stays_in_its_sandbox(template):
    asked = tokenizer()
    asked.chat_template = template
    with pytest.raises(InputError, match="chat template of the tokenizer .* cannot be used"):
        Chat(asked, {"apply_chat_template": True}).prompt("Who is it?")


def test_a_kernel_of_the_hub_is_code(model):
    with pytest.raises(InputError, match="the attention 'someone/kernel', which is code from else"):
        load(model, attn_implementation="someone/kernel")


def test_an_adapter_cannot_have_a_module_imported(run):
    edit(run / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(InputError, match="has megatron_config"):
        load(run)


# --- paths in files ------------------------------------------------------------------------------


def lineage_of(folder, **root):
    content = json.loads((folder / "lineage.json").read_text())
    content["root"] |= root
    return content


@pytest.fixture
def elsewhere(saved, tmp_path_factory):
    """A model of the user's own, in another tree than the run that was sent."""
    folder = tmp_path_factory.mktemp("home") / "private" / "deep" / "model"
    return Path(shutil.copytree(saved, folder))


@pytest.fixture
def sent(run, tmp_path, saved):
    """The run in a tree of its own: saves/unlearn/run."""
    home = tmp_path / "saves" / "unlearn"
    home.mkdir(parents=True)
    shutil.copytree(saved, tmp_path / "saves" / "root")
    folder = Path(shutil.move(run, home / "run"))
    edit(folder / "lineage.json", **lineage_of(folder, path="../../root", fingerprint=None))
    assert Lineage.read(str(folder)).local_root
    return folder


def test_the_root_of_a_lineage_lies_near_by_or_has_a_hash(sent, elsewhere):
    path = os.path.relpath(elsewhere, sent)
    edit(sent / "lineage.json", **lineage_of(sent, path=path))
    with pytest.raises(InputError, match="outside of the folders that the run is in and without"):
        load(sent)
    from unlora.model.lineage import fingerprint

    edit(sent / "lineage.json", **lineage_of(sent, fingerprint=fingerprint(str(elsewhere))))
    load(sent)  # its content is the one that was trained on
    edit(sent / "lineage.json", **lineage_of(sent, fingerprint="0" * 64))
    with pytest.raises(InputError, match="has changed since"):
        load(sent)


def test_no_path_of_a_lineage_is_absolute(sent, elsewhere):
    edit(sent / "lineage.json", **lineage_of(sent, path=str(elsewhere)))
    with pytest.raises(InputError, match="must be relative to its folder"):
        load(sent)
    content = lineage_of(sent, path="../../root")
    content["links"][0]["path"] = str(sent)
    edit(sent / "lineage.json", **content)
    with pytest.raises(InputError, match="must be relative to its folder"):
        load(sent)


@pytest.mark.parametrize("local", [True, False])
def test_the_given_path_of_a_root_is_held_to_the_same(sent, elsewhere, local):
    edit(sent / "lineage.json", **lineage_of(sent, path="gone", given=str(elsewhere), local=True))
    with pytest.raises(InputError, match="outside of the folders"):
        load(sent)
    relative = os.path.relpath(elsewhere)
    edit(sent / "lineage.json", **lineage_of(sent, path=relative, local=False))
    with pytest.raises(InputError, match="outside of the folders"):
        load(sent)


def test_a_link_to_another_tree_is_followed_before_it_is_judged(sent, elsewhere):
    (sent.parents[1] / "linked").symlink_to(elsewhere, target_is_directory=True)
    edit(sent / "lineage.json", **lineage_of(sent, path="../../linked"))
    with pytest.raises(InputError, match="outside of the folders"):
        load(sent)


def test_an_adapter_of_a_lineage_has_its_hash_wherever_it_is(sent, elsewhere):
    adapted(seed=7, target_modules=["q_proj"]).save_pretrained(
        elsewhere, save_embedding_layers=False
    )
    content = lineage_of(sent)
    content["links"][0]["path"] = os.path.relpath(elsewhere, sent)
    edit(sent / "lineage.json", **content)
    with pytest.raises(InputError, match="sha256 has changed"):
        load(sent)
    (sent / "adapter_model.safetensors").unlink()
    (sent / "adapter_model.safetensors").symlink_to(elsewhere / "adapter_model.safetensors")
    content["links"][0]["path"] = "."
    edit(sent / "lineage.json", **content)
    with pytest.raises(InputError, match="sha256 has changed"):
        load(sent)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("way", ["absolute", "up", "link"])
def test_the_base_of_a_foreign_adapter_lies_near_by(sent, elsewhere, way, monkeypatch):
    (sent / "lineage.json").unlink()
    path = {"absolute": str(elsewhere), "up": os.path.relpath(elsewhere)}.get(way)
    if way == "link":
        path = str(sent.parent / "base")
        Path(path).symlink_to(elsewhere, target_is_directory=True)
    edit(sent / "adapter_config.json", base_model_name_or_path=path)
    with pytest.raises(InputError, match="outside of the folders that it is in") as refused:
        load(sent)
    named = re.search(r"type UNLORA_MODELS=(\S+) before the command", str(refused.value))
    with monkeypatch.context() as typed:
        typed.setenv("UNLORA_MODELS", named[1])
        load(sent)
    monkeypatch.chdir(elsewhere.parents[4])  # whoever works above both knows them
    edit(sent / "adapter_config.json", base_model_name_or_path=str(elsewhere))
    load(sent)


def test_adapters_that_name_each_other_end(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        adapted(target_modules=["q_proj"]).save_pretrained(
            tmp_path / one, save_embedding_layers=False
        )
        base = str(tmp_path / other)
        edit(tmp_path / one / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(InputError, match="names itself as its base model"):
        Lineage.read(str(tmp_path / "a"))


def test_the_start_of_a_run_elsewhere_is_the_one_with_the_hash(sent, elsewhere):
    content = lineage_of(sent)
    content["links"] = [content["links"][0], {"path": ".", "sha256": "0", "config_sha256": "0"}]
    edit(sent / "lineage.json", **content)
    args = {"model": {"model_args": {"pretrained_model_name_or_path": str(elsewhere)}}}
    assert start_of(sent, args) != str(elsewhere)


def test_near_is_below_the_tree_of_the_run_or_where_one_works(tmp_path, monkeypatch):
    run, work = tmp_path / "a" / "saves" / "unlearn" / "x", tmp_path / "b"
    for folder in (run, work, tmp_path / "a" / "saves2"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    assert near(run / "../../finetune", run) and near("here", run)
    for path in (run / "../../../x", "/etc", tmp_path / "a/saves2", "../a", "/"):
        assert not near(path, run), path
    (work / "link").symlink_to("/etc")
    assert not near("link", run)
    monkeypatch.chdir("/")
    assert not near("/etc", run)
    monkeypatch.setenv("UNLORA_MODELS", f"{tmp_path / 'none'}:/etc")
    assert near("/etc/x", run) and not near("/usr", run)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UNLORA_MODELS", "~/models")
    assert near(tmp_path / "models" / "x", run) and not near("~/models", run)


def test_a_study_reports_its_own_runs(tmp_path):
    study = tmp_path / "saves" / "study" / "x"
    study.mkdir(parents=True)
    run = {"run": "a", "role": "method", "seed": 0}
    edit(study / "study.json", runs=[{**run, "folder": "../../unlearn/a"}])
    assert len(read_study(study).entries) == 1
    (study / "link").symlink_to("/etc")
    for folder in ("/etc", "../../../../etc", "link"):
        edit(study / "study.json", runs=[{**run, "folder": folder}])
        with pytest.raises(InputError, match="outside of the folders that the study"):
            read_study(study)


def test_a_run_brings_no_logs_of_elsewhere_into_a_report(tmp_path, tmp_path_factory):
    log = {"forget_Q_A_Prob": {"agg_value": 0.5}}
    secret = tmp_path_factory.mktemp("home") / "far" / "off" / "target"
    run = tmp_path / "saves" / "unlearn" / "x"
    for folder in (run, secret, run.parent / "near"):
        (folder / "evals").mkdir(parents=True)
        edit(folder / "evals" / "TOFU_EVAL.json", **log)
    for path, count in ((secret, 1), (run.parent / "near", 2)):
        args = {"pretrained_model_name_or_path": str(path)}
        edit(run / "run_config.json", mode="unlearn", model={"model_args": args})
        assert len(entries_of([run])) == count


# --- files that are made to be too much -----------------------------------------------------------


@pytest.mark.parametrize("name", ["lineage.json", "adapter_config.json", "config.json"])
def test_json_nested_too_deeply_is_one_sentence(run, model, name):
    (run if name != "config.json" else model).joinpath(name).write_text("[" * 200_000)
    if name == "config.json":
        edit_root = lineage_of(run, fingerprint=None)
        edit(run / "lineage.json", **edit_root)
    with pytest.raises(InputError) as caught:
        load(run)
    assert "\n" not in str(caught.value)


def test_a_log_nested_too_deeply_is_one_sentence(tmp_path):
    (tmp_path / "TOFU_EVAL.json").write_text('{"a":' * 200_000)
    with pytest.raises(InputError, match="is not JSON: it is nested too deeply"):
        read_mapping(tmp_path / "TOFU_EVAL.json")


def test_yaml_that_multiplies_itself_is_refused(tmp_path):
    (tmp_path / ".hydra").mkdir()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / ".hydra" / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="refers to parts of itself"):
        read_records(tmp_path)


def test_a_header_that_claims_to_be_large_is_refused(model):
    (model / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{" * 100)
    with pytest.raises(InputError, match="damaged"):
        load(model)


def test_refusals_end_a_command_in_one_sentence(model, bait, capsys):
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", bait)
    with pytest.raises(SystemExit) as ended:
        main.main(["chat", str(model)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "pickled" in said and "Traceback" not in said
    refuse_pickle(model.parent)
