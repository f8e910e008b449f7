import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, VOCABULARY, adapted, llama, qwen2, rows

from unlora.data.collate import collate
from unlora.forward import IGNORE_INDEX
from unlora.forward.forward_pass import ask


def plain(model, batch):
    """The same numbers the slow way: whole logits, then the scored positions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORE_INDEX
    return logits[:, :-1][kept], labels[kept]


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("lora", [False, True])
def test_scored_logits_equal_those_of_the_whole_forward_pass(make, lora):
    model = make().eval()
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)).eval()
    batch = collate(rows([3, 7, 1]), pad_id=0)
    out = ask(model, batch)
    logits, labels = plain(model, batch)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=2e-5)
    assert out.labels.tolist() == labels.tolist()
    assert out.lengths.tolist() == [3, 7, 1]


def test_prompt_and_padding_never_reach_the_vocabulary_projection():
    model, seen = llama().eval(), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    ask(model, collate(rows([3, 7, 1]), pad_id=0))
    assert seen == [(1, 11, 32)]
    assert not model.lm_head._forward_pre_hooks, "the hook must not stay"


def test_hooks_see_each_pass_once_under_an_adapter():
    """peft calls the model in it from 0.21 on, and its forward before."""
    model, seen = adapted().eval(), []
    model.get_base_model().register_forward_hook(lambda *_: seen.append("model"))
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: seen.append("head"))
    ask(model, collate(rows([3, 7, 1]), pad_id=0))
    assert seen.count("head") == 1 and seen.count("model") <= 1


def test_padding_changes_nothing():
    model = llama().eval()
    one, two = rows([3, 9])
    alone = ask(model, collate([one], pad_id=0)).token_logps
    padded = ask(model, collate([one, two], pad_id=5)).token_logps
    torch.testing.assert_close(padded[:3], alone, rtol=0, atol=2e-5)


def test_sequence_sums_are_by_row():
    out = ask(llama().eval(), collate(rows([2, 5]), pad_id=0))
    logps = out.logits.log_softmax(-1).gather(1, out.labels[:, None])[:, 0]
    torch.testing.assert_close(out.sequence_logps[0], logps[:2].sum())
    torch.testing.assert_close(out.sequence_logps[1], logps[2:].sum())
    assert out.logits.shape == (7, VOCABULARY)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="not a causal LM"):
        ask(torch.nn.Linear(2, 2), collate(rows([2]), pad_id=0))
