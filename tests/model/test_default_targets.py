"""What an adapter is put on where nobody says it, in architectures with names of their own."""

import families
import pytest

from unlora.config.resolve import shipped
from unlora.errors import InputError
from unlora.model.lora import checked_lora_config

DEFAULT = shipped("lora/default.yaml")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
OWN = {
    "llama": set(DEFAULT["target_modules"]),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"},
    # experts are reached by some tokens only
    "mixtral": ATTENTION | {"lm_head"},
    "qwen3_moe": ATTENTION | {"lm_head"},
    "gpt_oss": ATTENTION | {"lm_head"},
    # peft takes the names of the dense layers and the shared expert for the routed ones
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "lm_head"},
    "qwen3_next": ATTENTION | {"in_proj_qkvz", "in_proj_ba", "out_proj", "lm_head"},
    # kernels read other weights of a state-space mixer past an adapter
    "mamba": {"in_proj", "lm_head"},
    "granitemoehybrid": ATTENTION | {"in_proj", "input_linear", "output_linear", "lm_head"},
    "lfm2": ATTENTION - {"o_proj"} | {"in_proj", "out_proj", "w1", "w2", "w3", "lm_head"},
}


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("family", OWN)
def test_the_default_is_what_the_architecture_has(family, caplog):
    with caplog.at_level("INFO"):
        found = checked_lora_config(DEFAULT, families.config(family)).target_modules
    assert set(found) == OWN[family]
    assert (f"the adapter of a {family} is on its" in caplog.text) == (family != "llama")


def test_a_target_of_the_users_that_is_not_there_is_refused_with_what_to_type():
    given = DEFAULT | {"target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(InputError) as error:
        checked_lora_config(given, families.config("phi3"))
    *_, typed = str(error.value).partition("model.lora_config.target_modules=")
    assert set(typed.strip("[].").split(",")) == OWN["phi3"]
