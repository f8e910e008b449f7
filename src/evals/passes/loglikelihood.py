"""Teacher-force answers: each token's probability, and what the vocabulary looked like there.

Rows that begin alike (the answers to one question, questions under one template, questions after
the same examples) are written as one *tree*, in which a token sees only what stands before it in
its own row. So a beginning is read once, and a batch has next to no padding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from unlora.data.chat_encoding import Encoded
from unlora.evals.passes.batching import (
    Budget,
    Progress,
    answer_all,
    found_budget,
    needs_all_processes,
)
from unlora.evals.records import Scored
from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import decoder_layers, output_embedding
from unlora.forward.lm_head import factors
from unlora.forward.modes import agree, device_of, evaluating, takes, unwrapped
from unlora.forward.prefix_tree import Tree, _tree, trees
from unlora.forward.vocab_stats import before_the_head, numbers_from, numbers_of

LOGITS_AT_ONCE = 1 << 27  # where the head cannot be asked in blocks: 512 MiB in float32
# multiplications in attention cost this much more than those of the layers' weights
PAIR = 4.0
MOST_IN_A_TREE = 4096
SEEN = 1e-5  # of its numbers a row may owe to the one before: experts are multiplied in groups
# what a config calls the number of tokens that a layer sees at most
COUNTED_BY_PLACE = (
    "sliding_window", "window_size", "attention_chunk_size", "max_position_embeddings"
)  # fmt: skip
logger = logging.getLogger(__name__)


@torch.no_grad()
def score(
    model: nn.Module,
    rows: Sequence[Encoded],
    texts: Sequence[str],
    *,
    pad_id: int,
    end_id: int | None,
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> list[Scored]:
    """Teacher-force every row once; only scored tokens reach the vocabulary.

    A row on which the logits are not finite gets an empty record, and a warning counts it.

    Args:
        texts: the scored text of each row.
        end_id: the token that ends an answer.
        batch_size: at most these sequences at a time.
        tokens: at most these tokens at a time; None finds a number.
        progress: told the number of tokens done.
    """
    lm = unwrapped(model)
    nothing = np.zeros(0, dtype=np.float32)
    records = [
        Scored(nothing, nothing.astype(bool), nothing, nothing, text, False) for text in texts
    ]
    ends = [_last_scored(row) for row in rows]
    wanted = [i for i, end in enumerate(ends) if end]
    progress(sum(len(row.input_ids) for row, end in zip(rows, ends, strict=True) if not end))
    dead = 0
    with evaluating(lm):
        asker = _Asker(lm, rows, pad_id)
        made = asker.trees(wanted, ends)
        answered = answer_all(
            made,
            [len(tree.ids) for tree in made],
            asker.ask,
            lm,
            budget=Budget(asker.most(tokens), batch_size),
            apart=asker.apart,
            progress=lambda done: progress(
                sum(len(rows[i].input_ids) for tree in done for i in tree.rows)
            ),
        )
    for tree, columns in zip(made, answered, strict=True):
        for i, (logp, hit, mean, var) in zip(tree.rows, columns, strict=True):
            if np.isfinite(logp).all():
                ended = rows[i].labels[-1] == end_id
                records[i] = Scored(logp, hit > 0, mean, var, texts[i], ended)
            else:
                dead += 1
    warn_of_dead(dead, len(rows))
    return records


def warn_of_dead(dead: int, rows: int) -> None:
    """Log how many rows have logits that are not finite."""
    if dead:
        logger.warning("The model's logits are not finite on %d of %d rows; not scored", dead, rows)


def _last_scored(row: Encoded) -> int:
    """The place of the last scored token; 0 where there is none, as the first is never scored."""
    labels = row.labels
    return next((t for t in range(len(labels) - 1, 0, -1) if labels[t] != IGNORE_INDEX), 0)


@dataclass(frozen=True)
class Abilities:
    """What an architecture allows, found by trying.

    Attributes:
        trees: it answers rows in a tree as it answers them alone.
        blocks: its logits are a plain product, so that the vocabulary can be asked in blocks.
    """

    trees: bool
    blocks: bool


_ABILITIES: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()


def takes_blocks(lm: nn.Module, pad_id: int) -> bool:
    """Whether the vocabulary of a model can be asked in blocks."""
    return _Asker(lm, [], pad_id).can.blocks


class _Asker:
    """Asks one model about the rows of one question."""

    def __init__(self, lm: Any, rows: Sequence[Encoded], pad_id: int):
        self.lm, self.rows, self.pad_id = lm, rows, pad_id
        self.device, self.head = device_of(lm), output_embedding(lm)
        self.vocabulary = lm.config.get_text_config().vocab_size
        if lm not in _ABILITIES:
            _ABILITIES[lm] = self._tried()
        known = _ABILITIES[lm]
        self.can = Abilities(known.trees, known.blocks and self._factors_exist())

    def trees(self, wanted: Sequence[int], ends: Sequence[int]) -> list[Tree]:
        """The rows as trees; the last scored token of a row is predicted, not read."""
        read = [self.rows[i].input_ids[: ends[i]] for i in wanted]
        config = self.lm.config.get_text_config()
        # some count their window, or the columns of their own mask, along the sequence
        limits = (getattr(config, key, None) for key in COUNTED_BY_PLACE)
        limit = min((number for number in limits if isinstance(number, int)), default=1 << 30)
        layers = decoder_layers(self.lm)
        weights = sum(p.numel() for p in layers.parameters())
        pairs = 4 * PAIR * config.hidden_size * len(layers)
        joined = self.can.trees and all(len(ids) <= limit for ids in read)
        most = min(MOST_IN_A_TREE, limit) if joined else 0
        made = trees(read, per_token=2.0 * max(weights, 1), per_pair=pairs, most=most)
        for tree in made:
            tree.rows = [wanted[k] for k in tree.rows]
        return made

    def most(self, tokens: int | None) -> int | None:
        """The tokens of a batch: few where all of them may meet the vocabulary at once."""
        if self.can.blocks:
            return tokens
        most = max(1, LOGITS_AT_ONCE // self.vocabulary)
        return min(most, tokens or found_budget(self.lm))

    def apart(self, tree: Tree) -> list[Tree]:
        """Each row of a tree as a tree of its own."""
        return [
            _tree([(i, [tree.ids[index] for index in path], 0)])
            for i, path in zip(tree.rows, tree.paths, strict=True)
        ]

    def ask(self, batch: list[Tree]) -> list[list[np.ndarray]]:
        """Of each tree, of each of its rows, the four numbers of its scored tokens."""
        width = max(len(tree.ids) for tree in batch)
        predicts, labels, lengths = [], [], []
        for k, tree in enumerate(batch):
            for i, path in zip(tree.rows, tree.paths, strict=True):
                scored = np.array(self.rows[i].labels[1 : len(path) + 1])
                is_scored = scored != IGNORE_INDEX
                predicts.append(k * width + path[is_scored])
                labels.append(scored[is_scored])
                lengths.append(int(is_scored.sum()))
        places, index = np.unique(np.concatenate(predicts), return_inverse=True)
        numbers = self._numbers(batch, width, places, index, np.concatenate(labels))
        columns = iter(np.split(numbers, np.cumsum(lengths)[:-1], axis=1))
        return [[next(columns) for _ in tree.rows] for tree in batch]

    def _inputs(self, batch: Sequence[Tree], width: int) -> dict[str, Tensor]:
        gaps = [width - len(tree.ids) for tree in batch]
        pairs = list(zip(batch, gaps, strict=True))
        ids = torch.tensor([tree.ids + [self.pad_id] * gap for tree, gap in pairs])
        if all(len(tree.rows) == 1 for tree in batch):
            mask = torch.tensor([[1] * len(tree.ids) + [0] * gap for tree, gap in pairs])
            return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        depth = torch.zeros_like(ids)  # place of each token in its rows
        sees = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
        for k, tree in enumerate(batch):
            for path in map(torch.from_numpy, tree.paths):
                depth[k, path] = torch.arange(len(path))
                sees[k, path[:, None], path] = torch.ones(len(path), len(path)).tril().bool()
        sees = sees[:, None].to(self.device)
        if self.lm.config._attn_implementation == "eager":  # adds the mask to its scores
            dtype = self.lm.get_input_embeddings().weight.dtype
            sees = torch.zeros(sees.shape, dtype=dtype, device=self.device).masked_fill(
                ~sees, torch.finfo(dtype).min
            )
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": sees,
            "position_ids": depth.to(self.device),
        }

    def _numbers(
        self,
        batch: Sequence[Tree],
        width: int,
        places: np.ndarray,
        index: np.ndarray,
        labels: np.ndarray,
    ) -> np.ndarray:
        """One forward pass, and the four numbers of each scored token.

        Args:
            places: every place that predicts something, each once.
            index: of each scored token, which of them predicts it.
        """
        row, position = torch.from_numpy(places // width), torch.from_numpy(places % width)
        with before_the_head(self.head, row, position, whole=not self.can.blocks) as states:
            logits = self.lm(**self._inputs(batch, width), use_cache=False).logits[0]
        order = np.argsort(index, kind="stable")
        device = states[0].device
        at, wanted = (torch.from_numpy(x[order]).to(device) for x in (index, labels))
        products = factors(self.head, states[0]) if self.can.blocks else None
        statistics = (
            numbers_of(products, at, wanted) if products else numbers_from(logits, at, wanted)
        )
        numbers = np.empty((4, len(order)), dtype=statistics.cpu().numpy().dtype)
        numbers[:, order] = statistics.cpu().numpy()
        return numbers

    def _tried(self) -> Abilities:
        """Whether rows in a tree, and the vocabulary in blocks, give what the model alone gives."""
        ids = np.random.default_rng(0).integers(self.vocabulary, size=20).tolist()
        two = [ids[:13], ids[:6] + ids[13:]]
        known, self.rows = self.rows, [Encoded(row, [IGNORE_INDEX] * 7 + row[7:]) for row in two]
        single = [[_tree([(k, row[:-1], 0)])] for k, row in enumerate(two)]
        self.can = Abilities(trees=False, blocks=False)
        alone = self._logps(single)
        blocks = False
        # where a head is split over processes, only the forward pass of the model puts it together
        if not needs_all_processes(self.lm) and self._factors_exist() and self._head_is_last():
            self.can = Abilities(trees=False, blocks=True)
            blocks = agree(alone, self._logps(single), self.lm)
        self.can = Abilities(trees=False, blocks=blocks)
        shares = self.lm.config._attn_implementation in ("sdpa", "eager") and takes(
            self.lm, "position_ids"
        )
        try:
            if shares:
                tree = _tree([(0, two[0][:-1], 0), (1, two[1][:-1], 6)])
                # the same tokens one after the other, as if each saw all that stand before it
                blind = [[_tree([(0, two[0][:-1], 0)])], [_tree([(1, tree.ids, 0)])]]
                blind[1][0].paths[0] = tree.paths[1]
                wrong = self._logps(blind)
                shares = agree(alone, self._logps([[tree]]), self.lm, wrong) and self._apart(two)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            shares = False  # some want a mask of rows and columns, and nothing else
        self.rows = known
        return Abilities(shares, blocks)

    def _apart(self, two: Sequence[list[int]]) -> bool:
        """Whether the second row of a tree does not tell which row stands before it.

        What agrees but for rounding may still see a little of it.
        """
        first = two[0], two[0][:6] + [token // 2 for token in two[0][6:]]
        trees = [_tree([(0, tokens[:-1], 0), (1, two[1][:-1], 6)]) for tokens in first]
        alone, other = (self.ask([tree])[0][1][0] for tree in trees)
        return bool(np.abs(alone - other).max() <= SEEN * np.abs(alone).max())

    def _head_is_last(self) -> bool:
        """Whether the model's logits are what its head says, with nothing done to them after."""
        row = torch.tensor([self.rows[0].input_ids], device=self.device)
        positions = torch.arange(row.shape[1])
        with before_the_head(self.head, 0 * positions, positions, whole=True) as states:
            logits = self.lm(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
            ).logits[0]  # fmt: skip
        difference = (logits - self.head(states[0][None])[0]).float().abs().nan_to_num()
        return bool(difference.max() <= 1e-4 * logits.float().abs().nan_to_num().max())

    def _factors_exist(self) -> bool:
        weight = getattr(self.head, "weight", None)
        if weight is None:
            return False
        return factors(self.head, weight.new_zeros(0, weight.shape[-1])) is not None

    def _logps(self, batches: Sequence[list[Tree]]) -> np.ndarray:
        return np.concatenate(
            [row[0] for batch in batches for tree in self.ask(batch) for row in tree]
        )
