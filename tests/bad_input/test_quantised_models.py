"""Quantised weights that cannot be had: one sentence from each command, before any are read."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from bad_files import EVAL, FILES, UNLEARN, make_models, refuse_weights, refused, write_good_files

NF4 = "model.quantisation=nf4"
RAW = "+model.model_args.quantization_config"
FULL = ("unlearn", "experiment=unlearn/own/default", *FILES, "trainer=NPO", "task_name=mine")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Good files, and no bitsandbytes."""
    found = metadata.version

    def version(name):
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    make_models(tmp_path)
    write_good_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "version", version)
    refuse_weights(monkeypatch)


def says(**settings):
    """The root model says that its weights are quantised."""
    file = Path("root/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def was_trained(**model):
    """The adapter has a run config that says on which weights it was trained."""
    args = {"pretrained_model_name_or_path": "root"}
    content = {"model_args": args, "template_args": {"apply_chat_template": True}, **model}
    Path("run/run_config.json").write_text(json.dumps({"model": content}))


# command -> what is done to the files, and what is said
WRONG = {
    "another number of bits": ((*UNLEARN, "model=root", "model.quantisation=nf5"), None,
                               "Unknown model.quantisation 'nf5'. Did you mean 'nf4'"),
    "a number": ((*UNLEARN, "model=root", "model.quantisation=4"), None, "Known: int8, nf4"),
    "the other spelling": ((*UNLEARN, "model=root", "model.quantization=nf4"), None,
                           "Did you mean 'quantisation'"),
    "nothing to do it with": ((*UNLEARN, "model=root", NF4), None,
                              "nf4 weights need bitsandbytes, .*pip install 'unlora"),
    "nothing to ask it with": ((*EVAL, "model=root", "model.quantisation=int8"), None,
                               "int8 weights need bitsandbytes"),
    "nothing to ask a run with": ((*EVAL, "model=run"), lambda: was_trained(quantisation="nf4"),
                                  "nf4 weights need bitsandbytes"),
    "said twice": ((*UNLEARN, "model=root", NF4, f"{RAW}.load_in_8bit=true"), None,
                   "and model.model_args.quantization_config is set as well. Leave out one"),
    "trained in full": ((*FULL, "model=root", NF4), None, "cannot be trained in full. Set model"),
    "merged into": ((*UNLEARN, "model=run", NF4, "model.lineage=merge"), None,
                    "the base is quantised, .* Set model.lineage=stack"),
    "PerTA": ((*UNLEARN, "model=root", NF4, "trainer=PerTA"), None, "^PerTA computes with the w"),
    "FILA": ((*UNLEARN, "model=root", NF4, "plugin=[FILA]"), None, "^FILA computes with the w"),
    "ReGLU": ((*UNLEARN, "model=root", NF4, "plugin=[ReGLU]"), None, "^ReGLU computes with the w"),
    "pissa": ((*UNLEARN, "model=root", NF4, "model.lora_config.init_lora_weights=pissa"), None,
              "^pissa computes with the weights"),
    "raw settings of nothing": ((*UNLEARN, "model=root", f"{RAW}.bnb_4bit_quant_type=nf4"), None,
                                "must set load_in_4bit or load_in_8bit to true; none is set"),
    "torchao": ((*UNLEARN, "model=root"), lambda: says(quant_method="torchao", quant_type="int8"),
                "quantised by torchao, which is not supported. Give the model in float16"),
    "hqq, asked": ((*EVAL, "model=root"), lambda: says(quant_method="hqq"), "quantised by hqq, wh"),
    "a root below": ((*UNLEARN, "model=run"), lambda: says(quant_method="gptq", bits=4),
                     "has changed since|quantised by gptq"),
    "quantised already": ((*UNLEARN, "model=root", NF4),
                          lambda: says(quant_method="bitsandbytes", load_in_8bit=True),
                          r"quantised already \(bitsandbytes\), .* Leave out"),
    "quantised, and no package": ((*UNLEARN, "model=root"),
                                  lambda: says(quant_method="bitsandbytes", load_in_8bit=True),
                                  "int8 weights need bitsandbytes"),
    "a study of it": (("doctor", "experiment=unlearn/own/default", *FILES, "model=root", NF4,
                       "trainer=NPO"), None, "cannot be trained in full"),
}  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("words, change, expected", WRONG.values(), ids=WRONG)
def test_quantised_weights_that_cannot_be_had(here, words, change, expected, capsys, monkeypatch):
    if change is not None:
        change()
    refused(words, expected, capsys, monkeypatch)
