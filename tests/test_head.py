"""Log-probabilities a chunk at a time are those of whole logits, in value and in gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, qwen2

from unlora import head
from unlora.head import factors, token_logps
from unlora.outputs import output_embedding

TOKENS = 23


def adapted(make, **settings):
    torch.manual_seed(1)
    given = LORA | {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0} | settings
    return get_peft_model(make(), LoraConfig(**given, init_lora_weights=False))


@pytest.fixture(params=["kept", "again", "both"])
def chunks(request, monkeypatch):
    """Chunks of a few tokens whose logits are kept, computed a second time, or partly both."""
    vocabulary = llama().config.vocab_size
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5 * vocabulary)
    kept = {"kept": 1 << 30, "again": 0, "both": 11 * vocabulary}[request.param]
    monkeypatch.setattr(head, "LOGITS_KEPT", kept)


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


def test_a_gradient_is_taken_once():
    projection = llama().lm_head
    hidden = torch.randn(3, projection.in_features, requires_grad=True)
    found = token_logps(factors(projection, hidden), torch.tensor([1, 2, 3])).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        found.backward()


def test_other_heads_are_not_products():
    assert factors(torch.nn.Linear(4, 8, bias=True), torch.zeros(1, 4)) is None
    dora = adapted(llama, use_dora=True)
    assert factors(output_embedding(dora), torch.zeros(1, dora.config.hidden_size)) is None


def test_logits_of_a_chunk_are_all_there_is(monkeypatch):
    """Of a long answer, no tensor is larger than a chunk."""
    vocabulary = 4096
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 8 * vocabulary)
    monkeypatch.setattr(head, "LOGITS_KEPT", 0)
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
