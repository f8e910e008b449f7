"""A model without weights, to see what fits it before any are read."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unlora.errors import InputError
from unlora.model.files import shapes
from unlora.model.load import read_whole, shortened

# what peft puts before and after the name of a module
BEFORE, AFTER = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


def skeleton(architecture: PretrainedConfig, trust: bool = False) -> PreTrainedModel:
    """The modules of an architecture, on the meta device.

    Args:
        trust: whether its own code may be run.

    Raises:
        InputError: it is no causal language model, or its sizes make none.
    """
    try:
        with torch.device("meta"), read_whole():
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=trust
            )
    except Exception as error:  # a config of others fails in ways of its own
        if "for this kind of AutoModel" in str(error):
            raise InputError(
                f"A {architecture.model_type} is no causal language model. Give one that writes "
                "text from left to right."
            ) from error
        raise InputError(
            f"The config.json of this {architecture.model_type} describes no model "
            f"({shortened(error)}). Download or copy it again."
        ) from error
    return made


def check_fits(file: Path, root: str, architecture: PretrainedConfig, trust: bool = False) -> None:
    """Raises InputError where an adapter is for other modules than a model has.

    Args:
        root: what messages call the model.
        architecture: its config.
        trust: whether its own code may be run.
    """
    modules = dict(skeleton(architecture, trust).named_modules())
    known, model_type = False, architecture.model_type
    for name, shape in shapes(file).items():
        ending = next((end for end in AFTER if name.endswith(end)), None)
        if ending is None:
            continue
        path = name.removeprefix(BEFORE).removesuffix(ending)
        module = modules.get(path)
        known |= module is not None
        if isinstance(module, nn.Linear) and len(shape) == 2:
            inwards = ending == AFTER[0]
            size = module.in_features if inwards else module.out_features
            given = shape[1] if inwards else shape[0]
            if given != size:
                raise InputError(
                    f"The adapter {str(file.parent)!r} does not fit the model {root!r}: it has "
                    f"{given} {'inputs' if inwards else 'outputs'} at {path}, the model {size}. "
                    "Give the model that it was trained on."
                )
    if not known:
        raise InputError(
            f"The adapter {str(file.parent)!r} does not fit the model {root!r}: none of its "
            f"modules is in a {model_type}. Give the model that it was trained on."
        )
