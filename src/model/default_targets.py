"""List adapter targets for architectures whose layers have names of their own."""

from torch import nn

from unlora.forward.architecture import decoder_layers, output_embedding

ROUTERS = ("gate", "router", "shared_expert_gate")
# with transformers 5 peft takes these for routed experts wherever there are any, by any path
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def default_targets(model: nn.Module) -> list[str]:
    """The names of the linear layers of the decoder, and of its head.

    Left out are routers, and experts, of which a batch may reach none, with what is called as they
    are. A state-space mixer keeps its projection inwards alone: fused kernels read the weights of
    its other layers, not what an adapter on them says.

    Args:
        model: a causal language model, without weights if need be.
    """
    modules, stack, head = (
        dict(model.named_modules()),
        decoder_layers(model),
        output_embedding(model),
    )
    prefix = next(name for name, module in modules.items() if module is stack)
    left_out = {*ROUTERS, *(OF_EXPERTS if has_experts(model) else ())}
    names = []
    for name, module in modules.items():
        above, _, leaf = name.rpartition(".")
        if not isinstance(module, nn.Linear) or leaf in left_out:
            continue
        # a state-space mixer decays its state (A) and passes its input on (D)
        mixer = hasattr(modules[above], "A_log") and hasattr(modules[above], "D")
        inside = name.startswith(f"{prefix}.") and (leaf == "in_proj" or not mixer)
        if inside or module is head:
            names.append(leaf)
    return list(dict.fromkeys(names))


def has_experts(model: nn.Module) -> bool:
    """Whether tokens are routed to some of many experts."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())
