"""Log-probabilities a chunk at a time are those of whole logits, in value and in gradient."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, qwen2

from unlora.forward import lm_head
from unlora.forward.architecture import output_embedding
from unlora.forward.forward_pass import Way, ask_all
from unlora.forward.lm_head import factors, token_logps
from unlora.forward.outputs import TokenLogps

TOKENS = 23


def adapted(make, **settings):
    torch.manual_seed(1)
    given = LORA | {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0} | settings
    return get_peft_model(make(), LoraConfig(**given, init_lora_weights=False))


@pytest.fixture(params=["kept", "again", "first", "first and last"])
def chunks(request, monkeypatch):
    """Chunks of 5, 5, 5, 5 and 3 tokens, whose logits are kept or computed a second time."""
    vocabulary = llama().config.vocab_size
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 5 * vocabulary)
    tokens = {"kept": 1 << 20, "again": 0, "first": 11, "first and last": 13}[request.param]
    monkeypatch.setattr(lm_head, "LOGITS_KEPT", tokens * vocabulary)


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_value_and_gradients_are_those_of_whole_logits(chunks, make, trained):
    model = (adapted(make) if trained == "adapter" else make()).double()
    projection = output_embedding(model)
    width = model.config.hidden_size
    hidden = torch.randn(TOKENS, width, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(model.config.vocab_size, (TOKENS,))
    share = torch.randn(TOKENS, dtype=torch.float64)
    learnt = [p for p in projection.parameters() if p.requires_grad]
    whole = projection(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = torch.autograd.grad((whole * share).sum(), [hidden, *learnt])
    found = token_logps(factors(projection, hidden), labels)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((found * share).sum(), [hidden, *learnt])
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_dropout_of_the_adapter_is_that_of_its_module():
    model = adapted(llama, lora_dropout=0.5).train()
    projection, hidden = output_embedding(model), torch.randn(TOKENS, 16)
    hidden = torch.randn(TOKENS, model.config.hidden_size)
    labels = torch.zeros(TOKENS, dtype=torch.long)
    torch.manual_seed(3)
    expected = projection(hidden).log_softmax(-1)[:, 0]
    torch.manual_seed(3)
    found = token_logps(factors(projection, hidden), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_half_precision_is_no_coarser_than_logits_in_it():
    model = adapted(llama).bfloat16()
    projection = output_embedding(model)
    hidden = torch.randn(TOKENS, model.config.hidden_size, dtype=torch.bfloat16)
    labels = torch.randint(model.config.vocab_size, (TOKENS,))
    found = token_logps(factors(projection, hidden), labels)
    assert found.dtype == torch.float32
    exact = projection.float()(hidden.float()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)


def test_no_token_has_no_log_probability():
    projection = llama().lm_head
    nothing = torch.zeros(0, projection.in_features, requires_grad=True)
    found = token_logps(factors(projection, nothing), torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,)
    found.sum().backward()
    assert nothing.grad.shape == nothing.shape


def test_a_gradient_is_taken_once():
    projection = llama().lm_head
    hidden = torch.randn(3, projection.in_features, requires_grad=True)
    found = token_logps(factors(projection, hidden), torch.tensor([1, 2, 3])).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        found.backward()


def test_a_gradient_of_the_gradient_is_refused():
    projection = llama().lm_head
    hidden = torch.randn(3, projection.in_features, requires_grad=True)
    found = token_logps(factors(projection, hidden), torch.tensor([1, 2, 3])).square().sum()
    (slope,) = torch.autograd.grad(found, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def of_random_words(dtype, *, at_once, monkeypatch):
    """The gradients of states and words, a number of tokens at a time."""
    torch.manual_seed(5)
    states, words = torch.randn(512, 16), torch.randn(256, 16)
    labels, share = torch.randint(256, (512,)), torch.randn(512)
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", at_once * 256)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (states, words)]
    found = token_logps([tuple(leaves)], labels)
    return torch.autograd.grad((found * share.to(found)).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_chunks_round_gradients_of_words_no_more_than_one(dtype, monkeypatch):
    exact = of_random_words(torch.float64, at_once=512, monkeypatch=monkeypatch)[1]
    errors = {}
    for at_once in (512, 4):
        gradient = of_random_words(dtype, at_once=at_once, monkeypatch=monkeypatch)[1]
        assert gradient.dtype == dtype
        errors[at_once] = float((gradient - exact).norm() / exact.norm())
    assert errors[512] > 0
    assert errors[4] < 1.2 * errors[512]  # summed in this dtype it would be several times as much


def test_a_reference_within_autocast_says_what_a_policy_outside_says():
    """As in training: accelerate puts autocast around the forward pass, which ends before it."""
    model = llama().eval()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ids = torch.randint(1, model.config.vocab_size, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    said = []
    for within in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=within):
            (answer,) = ask_all(model, [(TokenLogps, batch)], way=Way(packs=True, chunks=True))
        said.append(answer.sequence_logps)
    assert said[0].dtype == torch.float32
    assert torch.equal(*said)


@pytest.mark.parametrize("learns", [True, False])
def test_logits_are_kept_only_for_a_gradient(learns, monkeypatch):
    made = []
    logits = lm_head._logits

    def seen(*args):
        found = logits(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(lm_head, "_logits", seen)
    projection = torch.nn.Linear(4, 8, bias=False)  # its weight asks for a gradient
    with torch.set_grad_enabled(learns):
        found = token_logps(factors(projection, torch.randn(3, 4)), torch.tensor([1, 2, 3]))
    assert found.requires_grad == learns
    assert [one() is not None for one in made] == [learns]


def test_other_heads_are_not_products():
    assert factors(torch.nn.Linear(4, 8, bias=True), torch.zeros(1, 4)) is None
    dora = adapted(llama, use_dora=True)
    assert factors(output_embedding(dora), torch.zeros(1, dora.config.hidden_size)) is None


def test_logits_of_a_chunk_are_all_there_is(monkeypatch):
    """Of a long answer, no tensor is larger than a chunk."""
    vocabulary = 4096
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 8 * vocabulary)
    monkeypatch.setattr(lm_head, "LOGITS_KEPT", 0)
    projection = torch.nn.Linear(4, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(512, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                largest = max(largest, found.numel())
            return found

    with Watch():
        logps = token_logps(factors(projection, hidden), torch.zeros(512, dtype=torch.long))
        logps.sum().backward()
    assert largest == 8 * vocabulary
