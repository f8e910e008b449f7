"""Question a model. Each pass runs at most once per (model, data) in an evaluation.

* :func:`score`: how likely given answers are, token by token;
* :func:`generate`: what the model writes itself; ``sample``: several draws of it;
* :func:`gradient_norm`: how strongly each answer would change the weights;
* :func:`hidden`: what the layers make of the answers;
* :func:`fluency_prob`: what a classifier thinks of written text.

Each of them is registered where it is written (:mod:`unlora.evals.passes.declaration`), with who is
asked (the model, its root, none), about what (answers, prompts), its version, and how its answers
are cached; a new one is a new file of this package.

A pass leaves the model as it was: modes, generation settings and random state. Rows are batched
under a token budget that is halved when memory runs out, and shared out over the processes of a
run; neither batches nor order change a result beyond float rounding. The batches themselves do
not depend on the number of processes, so that changes nothing at all.
"""

from unlora.evals.passes.generation import Sampling, generate
from unlora.evals.passes.gradient_norms import gradient_norm
from unlora.evals.passes.hidden_states import hidden
from unlora.evals.passes.loglikelihood import score
from unlora.evals.passes.text_classifier import fluency_prob, identity_of

__all__ = [
    "Sampling", "fluency_prob", "generate", "gradient_norm", "hidden", "identity_of", "score",
]  # fmt: skip
