"""Losses and gradients in plain words, with autograd alone, to compare a step with."""

import torch


def sums_and_lengths(model, batch):
    """log p(answer) and number of answer tokens of each row."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logps = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * scored).sum(1), scored.sum(1)


def mean_logp(model, batch):
    """Of the tokens, as GradDiff ascends."""
    sums, lengths = sums_and_lengths(model, batch)
    return sums.sum() / lengths.sum()


def row_logps(model, batch):
    """The mean of each row: what a loss with one value per token is for a row."""
    sums, lengths = sums_and_lengths(model, batch)
    return sums / lengths


def npo_rows(model, batch, beta=0.1):
    policy, _ = sums_and_lengths(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference, _ = sums_and_lengths(model, batch)
    return 2 / beta * (1 + (policy - reference).mul(beta).exp()).log()


def learnt(model):
    return [p for p in model.parameters() if p.requires_grad]


def slope(value, model):
    return list(torch.autograd.grad(value, learnt(model)))


def put(model, weights):
    with torch.no_grad():
        for p, weight in zip(learnt(model), weights, strict=True):
            p.copy_(weight)


def length(gradient):
    return torch.cat([g.detach().flatten() for g in gradient]).norm()


def added(one, other, share=1.0):
    return [a + share * b for a, b in zip(one, other, strict=True)]


def gap(one, other):
    """How far two gradients are apart, relative to the first."""
    return float(length(added(one, other, -1)) / length(one))


CLOSE = 1e-4  # float32 adds in another order; what is to be told apart differs by more than 1e-2
