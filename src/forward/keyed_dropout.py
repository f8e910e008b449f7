"""Draw a dropout mask that a token keeps, however its row is batched.

torch draws a mask for a whole batch, so 16 rows at once and 4 times 4 drop other channels. Here a
token's mask is fixed by a key of seed, step, row, place in the row, and module: each has its own
window of one long line of coin tosses. So a step trains the same in one batch or in several, packed
or padded, in one process or in many. Where no keys are known it is torch's dropout.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

WINDOWS = 1 << 20  # a power of two


class TokenKeys:
    """The keys of all tokens of a forward pass, or of those of them that one module sees.

    Args:
        tokens: a key of each, in the order in which they lie in the flattened input.
        of_one: no other module sees these tokens.
    """

    def __init__(self, tokens: Int[Tensor, " tokens"], of_one: bool = False):
        self.tokens, self.of_one = tokens, of_one
        self._windows: Tensor | None = None

    def windows(self, module: int, modules: int) -> Int[Tensor, " tokens"]:
        """Where the window of each token begins, for one module of so many."""
        if self.of_one:
            return _window(self.tokens + _scalar(module))
        if self._windows is None:  # of all modules at once: many small sums would take longer
            numbers = torch.arange(modules, device=self.tokens.device)
            self._windows = _window(self.tokens + mixed(numbers)[:, None])
        return self._windows[module]

    def select(self, places: Int[Tensor, " some"]) -> "TokenKeys":
        """Those of some of the tokens, for one module."""
        return TokenKeys(self.tokens[places.to(self.tokens.device)], of_one=True)


_now: TokenKeys | None = None  # of the forward pass that is being made


@contextmanager
def token_keys(keys: TokenKeys | None) -> Iterator[None]:
    """Within, masks are those of these tokens; with None they are drawn."""
    global _now
    before, _now = _now, keys
    try:
        yield
    finally:
        _now = before


def narrow(places: Int[Tensor, " some"]) -> None:
    """From here to the end of the pass only these tokens are left: the head sees no others."""
    global _now
    if _now is not None:
        _now = _now.select(places)


def keys_of(
    rows: Sequence[Int[Tensor, " rows"] | None],
    offsets: Sequence[Int[Tensor, " rows"]],
    size: int,
    *,
    once: int = 0,
    beginning: tuple[int, Tensor] | None = None,
) -> TokenKeys | None:
    """The keys of the tokens of a forward pass.

    Args:
        rows: of each batch, a key for each row; None where there are none.
        offsets: of each batch, where in the flattened input each of its rows begins.
        size: number of tokens of the flattened input.
        once: number of its first tokens with which every row begins; they belong to all.
        beginning: how many tokens of each row are keyed by their place alone, and their key.
    """
    if any(keys is None for keys in rows):
        return None
    begins, keys = torch.cat(list(offsets)), torch.cat([k for k in rows if k is not None])
    begins, order = begins.sort()
    flat = torch.arange(size, device=begins.device)
    # what follows a row until the next begins is padding, which nobody asks about
    row = (torch.searchsorted(begins + once, flat, right=True) - 1).clamp(min=0)
    position = flat - begins[row]
    tokens = keys[order][row] + position
    if beginning is not None:
        tokens = torch.where(position < beginning[0], beginning[1] + position, tokens)
    return TokenKeys(mixed(tokens))


def row_keys(numbers: Int[Tensor, " rows"], *parts: int) -> Int[Tensor, " rows"]:
    """A key for each row of these numbers, and of all the parts."""
    key = 0
    for part in parts:
        key = _scalar(key + part)
    return mixed(numbers + key)


@dataclass(frozen=True)
class Mask:
    """What the tokens of one pass are multiplied by, made anew whenever it is needed.

    Attributes:
        tosses: every window of the line of tosses.
        windows: where that of each token begins.
        scale: by which the result is to be multiplied as well.
    """

    tosses: Tensor
    windows: Int[Tensor, " tokens"]
    scale: float

    def factors(self) -> Tensor:
        """One factor for each channel of each token: [tokens, width]."""
        return self.tosses.index_select(0, self.windows)


class KeyedDropout(nn.Dropout):
    """Dropout by the keys of the tokens of this pass, where they are known.

    Args:
        p: share of channels that is dropped.
        number: of the module's input among the ``modules`` of its model; one mask for an input.
        seed: of the tosses.
    """

    def __init__(self, p: float, number: int, modules: int, seed: int):
        super().__init__(p)
        self.number, self.modules_in_all, self.seed = number, modules, seed
        self._was_keyed = False

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not self.training or self.p == 0.0:
            return input
        mask = self.mask(input)
        if mask is None:
            return super().forward(input)
        dropped: Tensor = input * mask.factors().view_as(input)
        return dropped if mask.scale == 1 else dropped * mask.scale

    def mask(self, input: Float[Tensor, "*batch width"]) -> Mask | None:
        """The mask of this pass, None where the keys of these tokens are not known."""
        recomputed = torch._C._current_graph_task_id() != -1
        fits = _now is not None and input[..., 0].numel() == len(_now.tokens)
        if recomputed and fits != self._was_keyed:
            raise RuntimeError(
                "A layer is computed again for its gradient without the keys of its tokens, so its "
                "dropout would be another. Set model.lora_config.lora_dropout=0, or leave out "
                "trainer.args.gradient_checkpointing."
            )
        self._was_keyed = fits
        if _now is None or not fits:
            return None
        windows = _now.windows(self.number, self.modules_in_all).to(input.device)
        # elsewhere a bit more work is less than the memory of a mask in numbers
        exact = input.dtype if input.device.type == "cpu" else torch.bool
        tosses = _tosses(self.seed, self.p, input.shape[-1], exact, input.device)
        return Mask(tosses, windows, 1 if exact == input.dtype else 1 / (1 - self.p))


@cache
def _tosses(
    seed: int, p: float, width: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "windows width"]:
    """Every window of the line of tosses: 0, or what keeps the mean; False or True of bools."""
    return _line(seed, p, width, dtype, device).unfold(0, width, 1)


@cache
def _line(
    seed: int, p: float, width: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " tosses"]:
    generator = torch.Generator().manual_seed(seed)
    tosses = torch.rand(WINDOWS - 1 + width, generator=generator)
    mask = tosses >= p
    return (mask if dtype == torch.bool else mask.double() / (1 - p)).to(device, dtype)


def keep_keys(model: nn.Module) -> None:
    """Have layers that are computed again for their gradient see the keys of their pass.

    Args:
        model: gradient checkpointing is switched on.
    """
    for module in model.modules():
        compute = getattr(module, "_gradient_checkpointing_func", None)
        if compute is not None and not isinstance(compute, _Computed):
            module._gradient_checkpointing_func = _Computed(compute)


class _Computed:
    """A checkpointing function whose layers see, both times, the keys of the first time."""

    def __init__(self, compute: Callable[..., Any]):
        self.compute = compute

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        keys = _now

        def with_keys(*args: Any, **kwargs: Any) -> Any:
            with token_keys(keys):
                return layer(*args, **kwargs)

        return self.compute(with_keys, *args, **kwargs)


def mixed(keys: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Keys whose every bit depends on every bit of those given (splitmix64)."""
    keys = keys.long() + _signed(0x9E3779B97F4A7C15)
    keys = (keys ^ _shifted(keys, 30)) * _signed(0xBF58476D1CE4E5B9)
    keys = (keys ^ _shifted(keys, 27)) * _signed(0x94D049BB133111EB)
    return keys ^ _shifted(keys, 31)


def _window(keys: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    return mixed(keys) & (WINDOWS - 1)


def _shifted(keys: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    return (keys >> bits) & ((1 << (64 - bits)) - 1)  # torch fills up with the sign


def _scalar(key: int) -> int:
    """:func:`mixed` of one number."""
    key = (key + 0x9E3779B97F4A7C15) % (1 << 64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return _signed(key ^ (key >> 31))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
