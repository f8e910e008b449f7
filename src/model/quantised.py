"""Handle quantised base weights: formats, compute dtype, and dequantised values.

``model.quantisation=nf4`` (or ``int8``) quantises a model as it is loaded, by bitsandbytes; a model
may also come quantised, and its config.json then says how:

* by bitsandbytes: it is used as it is;
* as fp8 or mxfp4: it is loaded as what these numbers stand for, in the dtype of the model;
* in any other way: it is refused, before weights are read.
"""

import importlib
import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from importlib import metadata
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.registry import unknown

# of each value of model.quantisation, what BitsAndBytesConfig is told; auto: the model's own dtype
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "auto",
    },
    "int8": {"load_in_8bit": True},
}
DEQUANTISED = ("fp8", "mxfp4")
PACKAGE = "bitsandbytes"
WITH_WEIGHTS = ("PerTA", "FILA", "ReGLU", "pissa", "olora")  # methods, plug-ins and starts
NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
HEADS = ("lm_head", "embed_out")
CHOICES = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "bnb_4bit_quant_storage": ("uint8", "float32", "bfloat16", "float16"),
}
logger = logging.getLogger(__name__)


def quantisation(
    architecture: PretrainedConfig, model_args: Mapping[str, Any], root: str
) -> Mapping[str, Any]:
    """The settings of bitsandbytes under which the weights will be held; none where they are plain.

    Args:
        architecture: the root's config.
        model_args: keyword arguments of ``from_pretrained``.
        root: what messages call the model.

    Raises:
        InputError: the weights are quantised in a way that is not supported, or in another than
            is asked for; or the settings are wrong.
    """
    stored, settings = _stored(architecture), model_args.get("quantization_config") or {}
    if not stored:
        if settings:
            _check(settings, stored=False)
        return settings
    method = _method(stored)
    if method != PACKAGE and method not in DEQUANTISED:
        raise InputError(
            f"The weights of {root!r} are quantised by {method}, which is not supported. Give the "
            "model in float16 or bfloat16; model.quantisation=nf4 quantises it as it is loaded."
        )
    if method in DEQUANTISED and not _dequantises(stored):
        raise InputError(
            f"The weights of {root!r} are quantised by {method}, which transformers "
            f"{metadata.version('transformers')} cannot dequantise. Install transformers 5, or "
            "give the model in bfloat16."
        )
    if settings:
        raise InputError(
            f"The weights of {root!r} are quantised already ({method}), so they cannot be "
            "quantised anew. Leave out model.quantisation and "
            "model.model_args.quantization_config, or give the model in bfloat16."
        )
    if method in DEQUANTISED:
        return {}
    _check(stored, stored=True)
    return stored


def loading_config(architecture: PretrainedConfig, model_args: Mapping[str, Any]) -> Any:
    """The ``quantization_config`` that ``from_pretrained`` is given; None for weights as they are.

    Args:
        model_args: those that :func:`quantisation` found right.
    """
    stored, settings = _stored(architecture), model_args.get("quantization_config")
    if stored and _method(stored) in DEQUANTISED:
        logger.info("the weights are %s, and are dequantised as they are loaded", _method(stored))
        from transformers.quantizers import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    if stored or not settings:
        return None
    own, declared = model_args.get("dtype"), getattr(architecture, "dtype", None)
    return _configured(settings, own if own in NUMBERS else declared or torch.float32)


def kind(settings: Any) -> str:
    """What weights with these settings are called."""
    if settings and settings.get("load_in_8bit"):
        return "int8"
    if settings and settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type") or "fp4")
    return "unquantised"


def count(parameter: Tensor) -> int:
    """How many weights a parameter holds; several of them may be packed into one number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def placed(model: Any) -> bool:
    """Whether a model is on its device already: quantised weights may not be moved."""
    return hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)


def check_training(
    settings: Mapping[str, Any], section: ModelSection, *, merges: bool, by: Iterable[str] = ()
) -> None:
    """Raises InputError where weights with these settings cannot be trained as is asked.

    Args:
        merges: whether there are earlier adapters, to be added to the weights if that is asked for.
        by: the method and its plug-ins.
    """
    if not settings:
        return
    if not section.use_lora:
        raise InputError(
            "Quantised weights cannot be trained in full. Set model.use_lora=true, or leave out "
            "model.quantisation and model.model_args.quantization_config."
        )
    if merges and section.lineage == "merge":
        raise InputError(
            "model.lineage is 'merge', but the base is quantised, and merging into quantised "
            "weights changes the answers. Set model.lineage=stack."
        )
    start = section.lora_config.get("init_lora_weights")
    used = next((name for name in (*by, str(start)) if name in WITH_WEIGHTS), None)
    if used:
        raise InputError(
            f"{used} computes with the weights themselves, which quantised ones do not allow. "
            "Choose another, or leave out model.quantisation and "
            "model.model_args.quantization_config."
        )


def versions(settings: Mapping[str, Any]) -> list[str]:
    """The packages whose versions the numbers of quantised weights depend on.

    Raises:
        InputError: they are not installed.
    """
    require_package(settings)
    return [f"{PACKAGE} {metadata.version(PACKAGE)}"] if settings else []


def settle(base: PreTrainedModel) -> None:
    """Let a quantised layer give the same answers whenever and beside whatever it is asked.

    As bitsandbytes has it, 4-bit weights are packed anew by a forward pass in eval mode on a CPU
    with AVX512-BF16, after which there are no gradients; and a product with 8-bit weights rounds
    its inputs, too, and that as far as the other rows of the batch allow.
    """
    if not getattr(base, "is_quantized", False):
        return
    layers = importlib.import_module(f"{PACKAGE}.nn")
    for module in base.modules():
        if isinstance(module, layers.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None and module.compute_dtype is not None:
                # the first forward pass would do it, and so change the model
                module.bias.data = module.bias.data.to(module.compute_dtype)
        elif isinstance(module, layers.Linear8bitLt):
            # accelerate's hooks hold the forward pass that they wrap
            wrapped = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(module, wrapped, MethodType(_forward_of_int8, module))


class _Int8Product(torch.autograd.Function):
    """x W^T with W dequantised for a moment, and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _of_int8(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return upstream[0] @ _of_int8(weight, scale, upstream[0].dtype), None, None


def _forward_of_int8(self: Any, x: Tensor) -> Tensor:
    if self.weight.CB is not None:
        self.init_8bit_state()
    product = _Int8Product.apply(x, self.weight, self.state.SCB)
    return product if self.bias is None else product + self.bias.to(product.dtype)


def _of_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.float() * (scale / 127)[:, None]).to(dtype)


# --- what is asked for, and what is stored -------------------------------------------------------


def _stored(architecture: PretrainedConfig) -> dict[str, Any]:
    """How the weights of a model are quantised, as its config.json says."""
    for config in (architecture, architecture.get_text_config(decoder=True)):
        settings = getattr(config, "quantization_config", None)
        if settings:
            return dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    return {}


def _method(stored: Mapping[str, Any]) -> str:
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return PACKAGE
    method = stored.get("quant_method")
    return str(getattr(method, "value", method))


def _dequantises(stored: Mapping[str, Any]) -> bool:
    from transformers.quantizers import AutoQuantizationConfig

    try:
        loaded = AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    except (TypeError, ValueError):
        return False
    return bool(getattr(loaded, "dequantize", False))


def _configured(settings: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    args = dict(settings)
    if args.get("bnb_4bit_compute_dtype") == "auto":
        args["bnb_4bit_compute_dtype"] = dtype
    if skipped := args.get("llm_int8_skip_modules"):
        # a list of one's own replaces transformers', and the head, which may be the embedding as
        # well, would be quantised
        args["llm_int8_skip_modules"] = [*dict.fromkeys([*skipped, *HEADS])]
    return BitsAndBytesConfig(**args)


def _check(settings: Mapping[str, Any], *, stored: bool) -> None:
    """Raises InputError where settings of bitsandbytes are wrong."""
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    for key in settings:
        if not stored and key not in known:
            raise InputError(unknown("key of quantization_config", key, known))
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if settings.get(key)]
    if len(bits) != 1:
        which = "both are set" if bits else "none is set"
        raise InputError(
            "model.model_args.quantization_config must set load_in_4bit or load_in_8bit to true; "
            f"{which}. For the usual settings write model.quantisation=nf4 or int8 instead."
        )
    for key, allowed in CHOICES.items():
        value = settings.get(key)
        if isinstance(value, str) and value not in allowed:
            raise InputError(unknown(key, value, allowed))
    try:
        _configured(settings, torch.float32)
    except ImportError:  # transformers 4 asks for the package's version
        require_package(settings)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"quantization_config: {reason}.") from error
    if settings.get("llm_int8_has_fp16_weight"):
        raise InputError(
            "llm_int8_has_fp16_weight keeps the weights in float16 and quantises them at each "
            "pass, for training in full. Leave it out."
        )


def require_package(settings: Mapping[str, Any]) -> None:
    """Raises InputError where weights with these settings need a package that is not there."""
    if not settings:
        return
    try:
        version = metadata.version(PACKAGE)
        importlib.import_module(PACKAGE)
    except ImportError as error:
        raise InputError(
            f"{kind(settings)} weights need {PACKAGE}, which is not installed or does not start "
            f"here ({error}). Install it with `pip install 'unlora[qlora]'`."
        ) from error
    if tuple(map(int, version.split(".")[:2])) < (0, 49):
        raise InputError(
            f"{PACKAGE} {version} is too old. Install a newer one with `pip install -U {PACKAGE}`."
        )
