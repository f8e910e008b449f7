"""Build a model on the meta device, to see what fits it before any weights are read."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unlora.errors import InputError
from unlora.model.load import read_whole, shortened


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
