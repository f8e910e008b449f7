"""Every objective end to end: asked of a tiny Llama with LoRA, in float64.

What is expected comes from the plain model, one row at a time and without padding, whole logits
sliced by hand, and from the formulas in ``papers.py``.
"""

import copy

import pytest
import torch
from papers import OTHER_SETTINGS, expected
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, rows
from torch import Tensor, nn
from views import numbers, random_draws

from unlora.data.chat_encoding import Encoded
from unlora.data.collate import collate
from unlora.forward import IGNORE_INDEX
from unlora.forward.forward_pass import ask, ask_all, ask_padded, scored_tokens
from unlora.forward.outputs import (
    Hidden,
    Outputs,
    Padded,
    ScoredTokens,
    SequenceLogps,
    TokenLogps,
)
from unlora.model.reference import as_reference, freeze_reference
from unlora.objectives import TERMS, Term, View

LAYER, DEPTH, WIDTH = 1, 3, 32
BY_BATCH = [name for name in TERMS if TERMS[name].unit == "batches"]
BY_ITEM = [name for name in TERMS if TERMS[name].unit != "batches"]
Parts = dict[str, list[Encoded]]


def questions(lengths: list[int], prompts: list[int], seed: int) -> list[Encoded]:
    """Rows with these numbers of scored tokens after prompts of these lengths."""
    return [
        rows([length], prompt=prompt, seed=10 * seed + i)[0]
        for i, (length, prompt) in enumerate(zip(lengths, prompts, strict=True))
    ]


# answers of one token are among them; alternate answers have the prompts of the answers
PARTS: Parts = {
    "forget": questions([3, 1, 5, 2], [2, 6, 3, 4], seed=1),
    "retain": questions([4, 2, 1, 6], [5, 1, 3, 2], seed=2),
    "alternate": questions([2, 4, 1, 3], [2, 6, 3, 4], seed=3),
}


# --- the models ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def float_is_float64(monkeypatch):
    """Logits and states are handed over as float32, which would hide what is beyond 1e-7."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def in_float64(model: nn.Module) -> nn.Module:
    """This model, its norms included, which transformers computes in float32."""
    model.double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon).double()
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def noisy(model: nn.Module, seed: int) -> nn.Module:
    """The adapter somewhere else: lora_B is 0 in a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.2 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return model


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**LORA)).double()


@pytest.fixture(scope="module")
def fresh():
    """A policy whose adapter started from zero, and a model of its own for the reference."""
    base = in_float64(llama(num_hidden_layers=DEPTH))
    before = copy.deepcopy(base)
    return noisy(adapted(base), 1), before


@pytest.fixture(scope="module")
def continued():
    """A policy whose adapter is trained further, and the model as it was before."""
    policy = noisy(adapted(in_float64(llama(num_hidden_layers=DEPTH))), 1)
    before = copy.deepcopy(policy)
    freeze_reference(policy)
    return noisy(policy, 2), before


@pytest.fixture(params=["fresh", "continued"])
def models(request):
    return request.getfixturevalue(request.param)


def trained(model: nn.Module) -> list[Tensor]:
    found = [p for name, p in model.named_parameters() if "lora_" in name and ".default." in name]
    assert len(found) == 2 * (3 * DEPTH + 1) and all(p.requires_grad for p in found)
    return found


# --- as it is asked, and by hand -----------------------------------------------------------------


def asked(policy: nn.Module, term: Term, batches: dict[str, dict[str, Tensor]]) -> dict[str, View]:
    """What the term declares, asked through the ways that the trainer has."""
    views = {}
    for name, kind in term.views.items():
        who, part = name.split("_")
        if who == "policy" or kind is ScoredTokens:
            views[name] = answer(policy, kind, batches[part], term.layer)
        else:
            with as_reference(policy) as reference:
                views[name] = answer(reference, kind, batches[part], term.layer)
    return views


def answer(model: nn.Module, kind: type, batch: dict[str, Tensor], layer: int | None) -> View:
    if kind is ScoredTokens:
        return scored_tokens(batch)
    if kind is Hidden:
        return ask_all(model, [(Hidden, batch)], layer=layer)[0]
    if kind is Padded:
        return ask_padded(model, batch)
    outputs = ask(model, batch)
    return SequenceLogps(outputs.sequence_logps) if kind is SequenceLogps else outputs


def by_hand(policy: nn.Module, before: nn.Module, term: Term, parts: Parts) -> list[list]:
    """The same from plain models as plain lists, see ``papers.py``."""
    found = []
    for name, kind in term.views.items():
        who, part = name.split("_")
        if kind is Padded:
            told = whole_batch(policy if who == "policy" else before, parts[part])
        else:
            model = policy if who == "policy" else before
            told = [alone(model, kind, row, term.layer) for row in parts[part]]
        if who == "reference":
            told = constant(told)
        found.append(told)
    return found


def alone(model: nn.Module, kind: type, row: Encoded, layer: int | None) -> list | Tensor:
    """One row by itself: as many positions as it has tokens."""
    scored = [t for t in range(1, len(row.labels)) if row.labels[t] != IGNORE_INDEX]
    if kind is ScoredTokens:
        return [row.input_ids[t] for t in scored]
    told = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=kind is Hidden)
    if kind is Hidden:
        # 0 is the embedding, so layer n has number n + 1; a token's state is where the token is
        return [told.hidden_states[layer + 1][0, t] for t in scored]
    # what is said of a token is said at the position before it
    tokens = [(told.logits[0, t - 1], row.input_ids[t]) for t in scored]
    if kind is SequenceLogps:
        return sum(z.log_softmax(-1)[y] for z, y in tokens)
    assert kind in (TokenLogps, Outputs)
    return tokens


def whole_batch(model: nn.Module, part: list[Encoded]) -> list[list]:
    """All positions of a padded batch, which Open-Unlearning's losses depend on."""
    width = max(len(row.input_ids) for row in part)
    ids = [row.input_ids + [0] * (width - len(row.input_ids)) for row in part]
    mask = [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in part]
    labels = [row.labels + [IGNORE_INDEX] * (width - len(row.labels)) for row in part]
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    return [[(logits[i, t], labels[i][t]) for t in range(width)] for i in range(len(part))]


def constant(told):
    if isinstance(told, Tensor):
        return told.detach()
    return type(told)(map(constant, told)) if isinstance(told, (list, tuple)) else told


def configured(name: str) -> Term:
    settings = OTHER_SETTINGS.get(name, [{}])[-1]
    here = {"layer": LAYER} if "layer" in TERMS[name].hyper else {}
    return TERMS[name].configure(**settings, **here)


def batched(parts: Parts, pad_id: int = 0, wider: int = 0) -> dict[str, dict[str, Tensor]]:
    """Each part as a batch, with so many columns of padding more than it needs."""
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        part: {
            key: nn.functional.pad(tensor, (0, wider), value=fill[key])
            for key, tensor in collate(examples, pad_id=pad_id).items()
            if key in fill
        }
        for part, examples in parts.items()
    }


def ours(policy: nn.Module, term: Term, batches: dict[str, dict[str, Tensor]]) -> Tensor:
    return term(asked(policy, term, batches), random_draws(term, WIDTH))


def gradient(losses: Tensor, policy: nn.Module, *, uneven: bool = False) -> list[Tensor]:
    """The gradient of the losses' sum, or of one in which each has another weight."""
    weights = torch.ones_like(losses)
    if uneven:
        weights = torch.arange(1.0, losses.numel() + 1, dtype=torch.float64).view_as(losses)
    parameters = trained(policy)
    found = torch.autograd.grad((losses * weights).sum(), parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in other)
    assert largest > 1e-6, "nothing is compared"
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * max(1.0, largest))


def by_row(values: Tensor, term: Term, parts: Parts) -> list[Tensor]:
    """The losses of each row."""
    if term.unit == "rows":
        return list(values)
    scored = [sum(x != IGNORE_INDEX for x in row.labels) for row in parts[term.part]]
    return list(values.split([max(0, n - term.skipped) for n in scored]))


def picked(parts: Parts, order: list[int]) -> Parts:
    return {part: [examples[i] for i in order] for part, examples in parts.items()}


# --- value and gradient --------------------------------------------------------------------------


@pytest.mark.default_cases(12)
@pytest.mark.parametrize("name", list(TERMS))
def test_value_and_gradient_are_those_of_plain_models_and_the_papers_formula(models, name):
    policy, before = models
    term = configured(name)
    values = ours(policy, term, batched(PARTS))
    papers = expected(term, by_hand(policy, before, term, PARTS), random_draws(term, WIDTH))
    assert term.count(batched(PARTS)[term.part]["labels"]) == values.numel()
    torch.testing.assert_close(values, papers, rtol=1e-10, atol=1e-10)
    assert_same(gradient(values, policy, uneven=True), gradient(papers, policy, uneven=True))


@pytest.mark.default_cases(5)
@pytest.mark.parametrize("name", [x for x in TERMS if "CEU" not in x])
def test_answers_of_one_token_are_enough(fresh, name):
    policy, before = fresh
    term = configured(name)
    parts = {part: questions([1, 1], [3, 2], seed) for seed, part in enumerate(PARTS, start=1)}
    values = ours(policy, term, batched(parts))
    papers = expected(term, by_hand(policy, before, term, parts), random_draws(term, WIDTH))
    assert values.isfinite().all()
    torch.testing.assert_close(values, papers, rtol=1e-10, atol=1e-10)
    assert_same(gradient(values, policy), gradient(papers, policy))


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", list(TERMS))
def test_the_first_token_of_plain_text_is_never_scored(fresh, name):
    """Its labels are all of its tokens, and nothing predicts the first."""
    policy, before = fresh
    term = configured(name)
    text = {
        part: [Encoded(row.input_ids, row.input_ids) for row in examples]
        for part, examples in PARTS.items()
    }
    values = ours(policy, term, batched(text))
    papers = expected(term, by_hand(policy, before, term, text), random_draws(term, WIDTH))
    torch.testing.assert_close(values, papers, rtol=1e-10, atol=1e-10)
    assert_same(gradient(values, policy, uneven=True), gradient(papers, policy, uneven=True))


def test_answers_no_longer_than_what_is_left_out_have_no_loss(fresh):
    term = TERMS["CEU"].configure(ignore_first_n_answer_tokens=1)
    parts = {"forget": questions([1, 1], [3, 2], seed=1)}
    values = ours(fresh[0], term, batched(parts))
    assert values.shape == (0,)
    assert values.sum().requires_grad, "a micro-batch without a loss can still go backward"


# --- the reference -------------------------------------------------------------------------------

ASK_THE_REFERENCE = [
    name
    for name in TERMS
    if any(v.startswith("ref") and k is not ScoredTokens for v, k in TERMS[name].views.items())
]


@pytest.mark.default_cases(6)
@pytest.mark.parametrize("name", ASK_THE_REFERENCE)
def test_no_gradient_reaches_the_reference(continued, name):
    policy, _ = continued
    term = configured(name)
    views = asked(policy, term, batched(PARTS))
    for view, told in views.items():
        assert numbers(told).requires_grad == view.startswith("policy")
    twin = [p for n, p in policy.named_parameters() if ".reference." in n]
    assert len(twin) == len(trained(policy))
    for parameter in policy.parameters():
        assert parameter.grad is None
    term(views, random_draws(term, WIDTH)).sum().backward()
    touched = {id(p) for p in policy.parameters() if p.grad is not None}
    assert touched and touched <= {id(p) for p in trained(policy)}
    policy.zero_grad(set_to_none=True)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", ASK_THE_REFERENCE)
def test_policy_and_reference_are_told_apart(fresh, name):
    """Else the comparisons above would compare nothing."""
    policy, before = fresh
    term = configured(name)
    lists = by_hand(policy, before, term, PARTS)
    drawn = random_draws(term, WIDTH)
    papers = expected(term, lists, drawn)
    mistaken = expected(term, by_hand(policy, policy, term, PARTS), drawn)
    assert not torch.allclose(papers, mistaken, rtol=1e-3)


# --- padding, order and split --------------------------------------------------------------------


@pytest.mark.default_cases(5)
@pytest.mark.parametrize("name", BY_ITEM)
def test_padding_changes_nothing(fresh, name):
    policy, _ = fresh
    term = configured(name)
    values = ours(policy, term, batched(PARTS))
    padded = ours(policy, term, batched(PARTS, pad_id=7, wider=5))
    torch.testing.assert_close(padded, values, rtol=1e-10, atol=1e-10)
    assert_same(gradient(padded, policy), gradient(values, policy))


@pytest.mark.default_cases(5)
@pytest.mark.parametrize("name", BY_ITEM)
def test_the_order_of_the_rows_changes_nothing(fresh, name):
    policy, _ = fresh
    term, order = configured(name), [2, 0, 3, 1]
    values = ours(policy, term, batched(PARTS))
    moved = ours(policy, term, batched(picked(PARTS, order)))
    of_row, of_moved = by_row(values, term, PARTS), by_row(moved, term, picked(PARTS, order))
    for place, row in enumerate(order):
        torch.testing.assert_close(of_moved[place], of_row[row], rtol=1e-10, atol=1e-10)
    assert_same(gradient(moved, policy), gradient(values, policy))


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1, 2], [3]]], ids=["4x1", "3+1"])
@pytest.mark.parametrize("name", BY_ITEM)
def test_the_split_of_a_batch_changes_nothing(fresh, name, split):
    policy, _ = fresh
    term = configured(name)
    values = ours(policy, term, batched(PARTS))
    pieces = [ours(policy, term, batched(picked(PARTS, part))) for part in split]
    torch.testing.assert_close(torch.cat(pieces), values, rtol=1e-10, atol=1e-10)
    assert_same(gradient(torch.cat(pieces), policy), gradient(values, policy))


# --- what Open-Unlearning computes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["KL_upstream", "UNDIAL_upstream"])
def test_upstreams_means_over_padding_shrink_with_it(fresh, name):
    policy, _ = fresh
    term = configured(name)
    value = ours(policy, term, batched(PARTS))
    assert not torch.allclose(ours(policy, term, batched(PARTS, wider=5)), value, rtol=1e-3)


@pytest.mark.parametrize("name", BY_BATCH)
def test_upstreams_losses_change_with_the_split(fresh, name):
    """Equal lengths are the exception: there the papers' means and upstream's are the same."""
    policy, _ = fresh
    term = configured(name)
    value = ours(policy, term, batched(PARTS))
    pieces = [ours(policy, term, batched(picked(PARTS, part))) for part in ([0, 1], [2, 3])]
    assert not torch.allclose(torch.stack(pieces).mean(), value, rtol=1e-3)


@pytest.mark.parametrize(
    "upstream, right",
    [("RMU_upstream", "RMU"), ("EMBED_DIFF_upstream", "EMBED_DIFF")],
)
def test_upstreams_distances_are_right_where_all_answers_are_equally_long(fresh, upstream, right):
    policy, _ = fresh
    equal = {part: questions([3, 3], [2, 4], seed) for seed, part in enumerate(PARTS)}
    for parts, agree in ((equal, True), (PARTS, False)):
        value = ours(policy, configured(upstream), batched(parts))
        mean = ours(policy, configured(right), batched(parts)).mean()
        assert torch.allclose(value, mean, rtol=1e-9) == agree
