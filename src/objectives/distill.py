"""Distil a distribution in which the forgotten token is weaker (UNDIAL, CEU, Unilogit, JensUn).

The distributions to learn are constants; no gradient goes through them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from unlora.forward.outputs import Outputs, ScoredTokens
from unlora.objectives import objective
from unlora.registry import Index, NotNegative

AT_ONCE, AT_ONCE_ON_GPU = 1 << 20, 1 << 26  # numbers that there are beside logits and gradient


@objective("UNDIAL")
def undial(
    policy_forget: Outputs, reference_forget: Outputs, *, beta: NotNegative = 10.0
) -> Float[Tensor, " tokens"]:
    """Cross-entropy to the reference with the answer's logit lowered by beta.

    Dong et al. 2024, arXiv:2402.10052. Open-Unlearning takes the mean over prompt and padding
    too, where its label -100 lowers the logit of an unrelated token; here, answer tokens only.

    Args:
        beta: nats by which the logit of the token to forget is lowered.
    """
    down = torch.full_like(policy_forget.labels, -beta, dtype=reference_forget.logits.dtype)
    lowered = reference_forget.logits.scatter_add(1, policy_forget.labels[:, None], down[:, None])
    return _cross_entropy(lowered, policy_forget.logits)


@objective("CEU", skips="ignore_first_n_answer_tokens")
def ceu(
    policy_forget: Outputs, *, ignore_first_n_answer_tokens: Index = 0
) -> Float[Tensor, " tokens"]:
    """Cross-entropy to the policy's own distribution without the answer's token (CE-U).

    Yang 2025, arXiv:2503.01224. An answer with no more tokens than are left out has no loss;
    Open-Unlearning's is NaN if that is true of a whole batch.

    Args:
        ignore_first_n_answer_tokens: these have no loss; the paper's footnote leaves out 1.
    """
    logits = policy_forget.logits
    others = _without(logits.detach(), policy_forget.labels)
    scored = policy_forget.position >= ignore_first_n_answer_tokens
    return _cross_entropy(others, logits)[scored]


@objective("Unilogit")
def unilogit(policy_forget: Outputs) -> Float[Tensor, " tokens"]:
    """KL(policy || itself with the answer's token at probability 1 / |V|).

    Vasilev et al. 2025, arXiv:2505.06027; the direction of the KL from summaries of the paper and
    a third party's port of its code. The target logit is z' = logsumexp of the others -
    log(|V| - 1), and the target is a constant.

    As all other tokens keep their proportions, that KL is the one between the two-sided coins
    (p, 1 - p) and (1/|V|, 1 - 1/|V|), in value and in gradient, p being the answer's probability.
    """
    logits, labels = policy_forget.logits, policy_forget.labels
    others = _without(logits, labels).logsumexp(-1)
    log_odds = logits.gather(1, labels[:, None]).squeeze(1) - others
    log_yes, log_no = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
    vocab = logits.shape[-1]
    yes = log_yes.exp() * (log_yes + math.log(vocab))
    no = log_no.exp() * (log_no + math.log(vocab) - math.log(vocab - 1))
    return yes + no


@objective("JensUn")
def jensun(policy_forget: Outputs, reference_alternate: ScoredTokens) -> Float[Tensor, " tokens"]:
    """Jensen-Shannon divergence to a refusal, repeated over the answer; at most log 2.

    Singh et al. 2025, arXiv:2509.02820; details from the authors' code. There the refusal is
    always "No idea"; here it is each row's alternate answer without its end token. No model is
    asked about it: only its tokens matter.

    For a certain target of probability p it is log 2 + (p log p - (1 + p) log(1 + p)) / 2.
    """
    target = _repeated(reference_alternate, policy_forget)
    log_p = -F.cross_entropy(policy_forget.logits, target, reduction="none")
    p = log_p.exp()
    return math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2


@objective("JSD")
def retain_jsd(policy_retain: Outputs, reference_retain: Outputs) -> Float[Tensor, " tokens"]:
    """Jensen-Shannon divergence to the reference over the vocabulary, in nats; at most log 2.

    JensUn's retain term, Singh et al. 2025, arXiv:2509.02820.
    """
    with torch.no_grad():
        policy = policy_retain.logits.log_softmax(-1)
        reference = reference_retain.logits.log_softmax(-1)
        both = torch.logaddexp(policy, reference)
        of_reference = (reference.exp() * (reference - both)).sum(-1)
        gap = policy - both
    # p log(p / (p + q)) + q log(q / (p + q)) has the derivative log(p / (p + q)) in p: what goes
    # through the logarithms adds up to 0, so they may be constants, and little is stored
    of_policy = (policy_retain.logits.softmax(-1) * gap).sum(-1)
    return math.log(2) + (of_policy + of_reference) / 2


def _cross_entropy(
    target: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """- sum softmax(target) log softmax(logits); the target is a constant.

    Args:
        target: nobody else's, as the gradient takes its place.
    """
    return _CrossEntropy.apply(target, logits)


class _CrossEntropy(torch.autograd.Function):
    """Its gradient, softmax(logits) - softmax(target), is made a few tokens at a time.

    Fresh memory for every step on the way there would take longer than the numbers in it.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, logits: Tensor) -> Tensor:
        target = target.detach()
        room = AT_ONCE if logits.device.type == "cpu" else AT_ONCE_ON_GPU
        chunk = max(1, room // logits.shape[-1])
        losses = [logits.new_zeros(0)]
        for t, z in zip(target.split(chunk), logits.split(chunk), strict=True):
            q, lse = t.softmax(-1), z.logsumexp(-1)
            losses.append(lse - (q * z).sum(-1))
            torch.sub((z - lse[:, None]).exp_(), q, out=t)
        ctx.slope = target  # ours alone, so it need not go through save_for_backward
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        slope, ctx.slope = ctx.slope, None
        if slope is None:
            raise RuntimeError("The gradient of this cross-entropy can be taken only once.")
        return None, slope.mul_(upstream[0][:, None])


def _without(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocab"]:
    """These logits with -inf for the label."""
    return logits.scatter(1, labels[:, None], -math.inf)


def _repeated(pattern: ScoredTokens, over: ScoredTokens) -> Int[Tensor, " tokens"]:
    """For every token of ``over``, a label of ``pattern``'s row: again and again from its start.

    The last label, with which an answer ends, is left out unless it is the only one.
    """
    period = (pattern.lengths - 1).clamp(min=1)
    return pattern.labels[pattern.starts[over.row] + over.position % period[over.row]]
