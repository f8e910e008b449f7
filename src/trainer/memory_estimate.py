"""What a training would need, from the config alone: no weights are read.

The architecture is built on torch's meta device, where a tensor has a shape and no memory, and the
adapter on it, so parameters are counted and not computed by rules. One decoder layer is then run on
fake tensors: what autograd keeps of it is what a layer costs in activations, whatever its kind.

``docs/architecture.md`` has how far estimates are from peaks that were measured.
"""

import functools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from unlora.config.schema import Config, ModelSection, TrainerSection
from unlora.data import load_part
from unlora.data.chat import Chat, Encoded
from unlora.errors import InputError
from unlora.forward.lm_head import LOGITS_AT_ONCE, LOGITS_KEPT
from unlora.forward.outputs import (
    IGNORE_INDEX,
    Hidden,
    Outputs,
    Padded,
    SequenceLogps,
    TokenLogps,
    decoder_layers,
    output_embedding,
)
from unlora.model.adapter import ADAPTER_WEIGHTS, adapter_settings
from unlora.model.adapter_init import STARTS
from unlora.model.lineage import Lineage
from unlora.model.load import load_args, root_config
from unlora.model.quantised import check_training, quantisation
from unlora.model.reference import rest_above
from unlora.model.run_defaults import as_trained
from unlora.model.targets import checked_lora_config
from unlora.model.tokenizer import load_tokenizer
from unlora.objectives import TERMS, Term

FINETUNE = "FinetuneTrainer"
COMPOSING = ("SAM", "GRU", "BalDRO", "PDU", "BLADE")  # plug-ins and objectives; see trainer.compose
STARTING = ("FILA", "ReGLU")
# numbers of its own that an optimiser keeps of each trained one, in the dtype of the weights
STATES = {"adamw": 2.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0}
LENGTH = 512  # tokens of a row, where neither data nor a max_length say more
HEADER = 180  # bytes that a safetensors file has for each tensor, about


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of one part of the data.

    Attributes:
        tokens: of its longest row; every row is padded to that.
        scored: tokens that are predicted, of all its rows.
    """

    rows: int
    tokens: int
    scored: int


@dataclass(frozen=True)
class Estimate:
    """What a training needs. Memory is in bytes, on one device, at the largest batch.

    Attributes:
        parameters: of the model, its adapters included, each counted once.
        trained: those that the optimiser changes.
        file: bytes on disk of what is saved: the adapter, or all weights.
        weights: of the model as it is loaded.
        adapter: the weights of adapters, that of the reference included.
        gradients: as many as are held at once.
        optimiser: its state.
        reference: a copy of the whole model, where an objective asks one and there is no adapter to
            switch off.
        activations: as the config sets ``gradient_checkpointing``.
        other_activations: as if it were set the other way.
        logits: of the scored tokens, and what the loss makes of them.
        checkpointing: whether gradient checkpointing is on.
        batches: part of the data -> its largest micro-batch.
        lengths: in words, where the lengths of rows are from.
    """

    parameters: int
    trained: int
    file: int
    weights: int
    adapter: int
    gradients: int
    optimiser: int
    reference: int
    activations: int
    other_activations: int
    logits: int
    checkpointing: bool
    batches: Mapping[str, Batch]
    lengths: str

    @property
    def parts(self) -> dict[str, int]:
        """What the memory is for -> bytes."""
        names = ("weights", "adapter", "gradients", "optimiser", "reference", "activations")
        return {name: getattr(self, name) for name in (*names, "logits")}

    def switched(self, checkpointing: bool) -> "Estimate":
        """The same with gradient checkpointing on or off."""
        if checkpointing == self.checkpointing:
            return self
        return replace(
            self,
            activations=self.other_activations,
            other_activations=self.activations,
            checkpointing=checkpointing,
        )

    @property
    def total_bytes(self) -> int:
        """The peak while it trains, without what Python and its libraries take."""
        return sum(self.parts.values())


def estimate(config: Config, batches: Mapping[str, Batch] | None = None) -> Estimate:
    """What the training of a config needs, before anything is loaded.

    Args:
        batches: the largest micro-batch of each part, where the data are read already.

    Raises:
        InputError: the architecture is out of reach, or settings do not go with it.
    """
    section = as_trained(config.model)
    config = config.model_copy(update={"model": section})
    args = load_args(section)
    lineage = Lineage.read(args["pretrained_model_name_or_path"], section.base)
    architecture = root_config(lineage, args)
    quantised = quantisation(architecture, args, lineage.root)
    by = (config.trainer.handler, *config.trainer.plugins)
    check_training(quantised, section, merges=bool(lineage.links), by=by)
    terms = _terms(config.trainer)
    views = {view: kind for term in terms for view, kind in term.views.items()}
    lengths = "the longest rows of the data"
    if batches is None:
        parts = sorted({view.split("_")[1] for view in views})
        batches, lengths = _batches(config, tuple(parts))

    base = _skeleton(architecture, args)
    if section.use_lora and _separates_head(base, section, lineage, quantised):
        head = output_embedding(base)
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    weights = _weight_bytes(base, quantised)
    frozen = _Frozen(0, 0)
    model: nn.Module = base
    if section.use_lora:
        model, frozen = _adapted(base, section, lineage, quantised)
        if _starts(config):
            frozen += _adapter(model)
    layer = next((term.layer for term in terms if term.layer is not None), None)
    depth = len(decoder_layers(model))
    policy = [view for view in views if view.startswith("policy_")]
    if layer is not None and all(views[view] is Hidden for view in policy):
        depth = min(layer, depth - 1) + 1
        rest_above(model, depth - 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = _adapter(model)
    sets = _gradient_sets(config.trainer)
    asked = [batches[view.split("_")[1]] for view in policy]
    found = [_activations(model, depth, batch) for batch in asked]
    join = sum if sets == 1 else max  # a composed step lets go of one graph before the next
    kept, checkpointed = (join(one[i] for one in found) for i in (0, 1))
    given: dict[str, Any] = dict(config.trainer.args)
    named = given.get("activation_checkpointing")  # as transformers 5.23 calls it
    on = bool(given.get("gradient_checkpointing") if named is None else named)
    saved = adapter.bytes * (1 + _starts(config)) if section.use_lora else weights
    tensors = sum("lora_" in name or not section.use_lora for name, _ in model.named_parameters())
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()) + frozen.count,
        trained=sum(p.numel() for p in trained),
        file=saved + HEADER * tensors,
        weights=weights,
        adapter=adapter.bytes + frozen.bytes,
        gradients=sum(map(_size, trained)) * sets,
        optimiser=_optimiser(config.trainer, trained),
        reference=0 if section.use_lora or not _asks_reference(views) else weights,
        activations=checkpointed if on else kept,
        other_activations=kept if on else checkpointed,
        logits=_logits(views, batches, base),
        checkpointing=on,
        batches=batches,
        lengths=lengths,
    )


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frozen:
    """Parameters, how many and in how many bytes."""

    count: int
    bytes: int

    def __add__(self, other: "_Frozen") -> "_Frozen":
        return _Frozen(self.count + other.count, self.bytes + other.bytes)


def _skeleton(architecture: PretrainedConfig, args: Mapping[str, Any]) -> Any:
    """The root model without memory, in the dtype that it would be loaded in."""
    dtype = args["dtype"]
    if dtype == "auto":
        dtype = getattr(architecture, "dtype", None) or torch.float32
    trust = {k: args[k] for k in ("trust_remote_code",) if k in args}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype, **trust)


def _adapted(
    base: Any, section: ModelSection, lineage: Lineage, quantised: Mapping[str, Any]
) -> tuple[PeftModel, _Frozen]:
    """The model with the adapter that is trained; and the adapters that rest beside it."""
    if section.lineage == "continue":
        if not lineage.links:
            raise InputError(
                "model.lineage is 'continue', but there is no adapter to continue. Give a run "
                "folder with an adapter, or leave model.lineage out."
            )
        lora, earlier = LoraConfig.from_pretrained(str(lineage.links[-1].path)), lineage.links[:-1]
        lora.inference_mode = False
    else:
        given = dict(section.lora_config)
        if given.get("init_lora_weights") in STARTS:
            given["init_lora_weights"] = True
        lora, earlier = checked_lora_config(given, base.config), lineage.links
    lora.init_lora_weights = True  # how it begins has no size
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, lora)
    frozen = _Frozen(0, 0)
    if section.lineage == "continue":
        frozen += _adapter(model)  # the twin that is the reference
    if quantised or section.lineage == "stack":
        for link in earlier:
            size = (link.path / ADAPTER_WEIGHTS).stat().st_size
            frozen += _Frozen(size // 4, size)
    return model, frozen


def _separates_head(
    base: Any, section: ModelSection, lineage: Lineage, quantised: Mapping[str, Any]
) -> bool:
    """Whether an earlier adapter on a tied head is merged, after which it is tied no more."""
    head = output_embedding(base)
    if head.weight is not base.get_input_embeddings().weight:
        return False
    merged = lineage.links[: -1 if section.lineage == "continue" else None]
    if quantised or section.lineage == "stack":
        return False
    name = next(n for n, module in base.named_modules() if module is head).rpartition(".")[2]
    return any(name in (adapter_settings(x.path).get("target_modules") or ()) for x in merged)


def _adapter(model: nn.Module) -> _Frozen:
    found = [p for name, p in model.named_parameters() if "lora_" in name]
    return _Frozen(sum(p.numel() for p in found), sum(map(_size, found)))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weight_bytes(base: Any, quantised: Mapping[str, Any]) -> int:
    """Bytes of the weights; of quantised ones with the scales that belong to them.

    nf4 and fp4 have half a byte for each number, and an absmax for each 64, in float32, or with
    double quantisation in one byte and a float32 for each 256 of those. int8 has a float32 for each
    output. The head and what has one dimension stay as they are.
    """
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else 0
    bits = bits or int(quantised.get("bits") or 0)
    small: dict[int, float] = {}
    if bits:
        skipped = tuple(quantised.get("llm_int8_skip_modules") or ())
        head = output_embedding(base)
        for name, module in base.named_modules():
            linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head
            if linear and not any(part in name for part in skipped):
                count, scales = module.weight.numel(), float(module.weight.shape[0] * 4)
                if bits == 4:
                    scales = count / 64 * 4
                    if quantised.get("bnb_4bit_use_double_quant"):
                        scales = count / 64 * (1 + 4 / 256)
                small[id(module.weight)] = count * bits / 8 + scales
    return math.ceil(sum(small.get(id(p), _size(p)) for p in base.parameters()))


# --- the objective -------------------------------------------------------------------------------


def _terms(trainer: TrainerSection) -> list[Term]:
    """The terms that have a weight, as ``unlora.trainer.loss`` builds them."""
    given = dict(trainer.method_args)
    gamma, alpha = given.pop("gamma", 1), given.pop("alpha", 1)
    retain = given.pop("retain_loss_type", None)
    if trainer.handler == FINETUNE:
        names = [retain or "NLL"]
    else:
        names = [trainer.handler] * bool(gamma) + [retain] * bool(retain and alpha)
    terms = [TERMS[name] for name in names]
    return [term.configure(**{k: given[k] for k in term.hyper if k in given}) for term in terms]


def _asks_reference(views: Mapping[str, type]) -> bool:
    """Whether a model that is trained in full needs a copy of itself."""
    live = (TokenLogps, Outputs, Hidden, Padded)
    return any(view.startswith("reference_") and kind in live for view, kind in views.items())


def _gradient_sets(trainer: TrainerSection) -> int:
    named = {*trainer.plugins, trainer.handler.removesuffix("_upstream")}
    return 1 + bool(named & {*COMPOSING}) + ("GRU" in named)


def _starts(config: Config) -> bool:
    """Whether the adapter starts at a part of the weights, beside a twin that takes it away."""
    given = config.model.lora_config.get("init_lora_weights")
    return given in STARTS or bool({*config.trainer.plugins} & {*STARTING})


def _optimiser(trainer: TrainerSection, trained: Sequence[torch.Tensor]) -> int:
    name = str(trainer.args.get("optim") or "adamw_torch")
    states = next((n for start, n in STATES.items() if start in name), STATES["adamw"])
    if name.startswith("paged"):
        return 0  # in the memory of the host
    small = "8bit" in name or "4bit" in name
    return int(states * sum(p.numel() * (1 if small else p.element_size()) for p in trained))


# --- a step --------------------------------------------------------------------------------------


def _batches(config: Config, parts: Sequence[str]) -> tuple[dict[str, Batch], str]:
    """The largest micro-batch of each part, and where that is known from."""
    rows = int(config.trainer.args.get("per_device_train_batch_size") or 8)
    data: dict[str, Any] = {
        part: config.data.get(part)
        or config.data.get({"retain": "train", "alternate": "forget"}.get(part, part))
        or {}
        for part in parts
    }
    found = {}
    try:
        for part, sources in data.items():
            lengths = _lengths(
                json.dumps(sources, sort_keys=True, default=str),
                config.model.model_dump_json(),
                config.paths.datasets_dir,
            )
            found[part] = largest(lengths, rows)
        return found, "the longest rows of the data"
    except InputError as error:
        for part, sources in data.items():
            given = [
                (source or {}).get("args", {}).get("max_length") for source in sources.values()
            ]
            longest = max((n for n in given if n), default=LENGTH)
            found[part] = Batch(rows, longest, rows * longest)
        return found, f"max_length, as the data cannot be read: {error}"


def largest(lengths: Sequence[tuple[int, int]], rows: int) -> Batch:
    """The largest micro-batch of rows of these tokens, and scored tokens."""
    scored = sorted((scored for _, scored in lengths), reverse=True)[:rows]
    return Batch(len(scored), max(tokens for tokens, _ in lengths), sum(scored))


def size_of(row: Encoded) -> tuple[int, int]:
    """The tokens of a row, and how many of them are scored."""
    return len(row.input_ids), sum(label != IGNORE_INDEX for label in row.labels[1:])


@functools.lru_cache(maxsize=64)
def _lengths(sources: str, model: str, datasets_dir: str | None) -> list[tuple[int, int]]:
    """Of every row, its tokens and how many of them are scored."""
    section = ModelSection.model_validate_json(model)
    chat = Chat(load_tokenizer(section), section.template_args)
    encoded = load_part(json.loads(sources), chat, datasets_dir=datasets_dir)
    return [size_of(row) for row in encoded]


def _activations(model: nn.Module, depth: int, batch: Batch) -> tuple[int, int]:
    """What autograd keeps of one pass: all of it, and with gradient checkpointing.

    A checkpoint keeps what goes into each layer, and makes one layer again when its gradient is
    due.
    """
    layer, outside, carried = _of_one_layer(model, batch)
    return depth * layer + outside, depth * carried + layer + outside


def _of_one_layer(model: Any, batch: Batch) -> tuple[int, int, int]:
    """Bytes that are kept inside a decoder layer and outside of all, and those that go into one."""
    inside, outside, carried = [0], [0], [0]
    place = outside
    own = set()
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in seen and key not in own:
            seen[key] = storage  # a storage that is gone would give its number to the next
            place[0] += storage.nbytes()
        return tensor

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal place
        place = inside
        hidden = args[0] if args else kwargs["hidden_states"]
        carried[0] = _size(hidden)

    def leave(*_: Any) -> None:
        nonlocal place
        place = outside

    def select(_module: nn.Module, args: Any) -> Any:
        hidden, *rest = args
        scored = min(batch.scored, batch.rows * batch.tokens)
        return (hidden.flatten(0, 1)[:scored].unsqueeze(0), *rest)

    first = decoder_layers(model)[0]
    head = output_embedding(model)
    training = model.training
    with FakeTensorMode(allow_non_fake_inputs=True), _faked(model), _only(model, first):
        own |= {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        hooks = [
            first.register_forward_pre_hook(enter, with_kwargs=True),
            first.register_forward_hook(leave),
            head.register_forward_pre_hook(select),
        ]
        try:
            ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
            model.train()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(input_ids=ids, use_cache=False)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
    return inside[0], outside[0], carried[0]


@contextmanager
def _faked(model: nn.Module) -> Iterator[None]:
    """Fake tensors on a device in place of those on meta, where attention takes other ways."""
    kept = []
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else fake
                    )
                kept.append((store, name, tensor))
                store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, name, tensor in kept:
            store[name] = tensor


@contextmanager
def _only(model: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Take all layers but this one away for a while."""
    layers = decoder_layers(model)
    parent = next(m for m in model.modules() if any(c is layers for c in m.children()))
    name = next(n for n, child in parent.named_children() if child is layers)
    setattr(parent, name, nn.ModuleList([layer]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def _logits(views: Mapping[str, type], batches: Mapping[str, Batch], base: Any) -> int:
    """What there is of the vocabulary's size: logits, their float32, and log p, for each pass.

    Of the pass whose gradient is being made, its gradient is there as well.
    """
    head = output_embedding(base)
    vocabulary, width = head.weight.shape[0], head.weight.element_size()
    total, largest = 0, 0
    for view, kind in views.items():
        if kind not in (TokenLogps, Outputs, SequenceLogps, Padded):
            continue
        batch = batches[view.split("_")[1]]
        tokens = batch.rows * batch.tokens if kind is Padded else batch.scored
        policy = view.startswith("policy_")
        if not policy and kind is SequenceLogps:
            continue  # one number a row, found before the first step
        if kind is TokenLogps:
            total += 4 * min(tokens * vocabulary, LOGITS_KEPT) if policy else 0
            largest = max(largest, 4 * LOGITS_AT_ONCE)
            continue
        float32 = 4 if width != 4 else 0
        total += tokens * vocabulary * ((width if policy else 0) + float32 + 4)
        if policy:
            largest = max(largest, tokens * vocabulary * (4 + width))
    return total + largest
