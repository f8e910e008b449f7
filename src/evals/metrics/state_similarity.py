"""Compare the hidden states of two models on the same texts."""

import numpy as np
from jaxtyping import Float

from unlora.evals.metrics import metric
from unlora.evals.records import RootStates, States
from unlora.results.value import Value


@metric("representation_similarity", higher_is_better=None)
def representation_similarity(states: States, root_states: RootStates) -> Value:
    """Linear CKA of the model's and the root's mean states over the rows; mean over the layers.

    Kornblith et al. 2019, arXiv:1905.00414. Range 0..1, 1 where the layers differ by a
    rotation and a scale only. A row that is not finite in either model is left out and counted.
    NaN with fewer than two rows, or where a layer says the same of every row.
    """
    pairs = [
        (ours, root)
        for ours, root in zip(states, root_states, strict=True)
        if np.size(ours) and np.isfinite(ours).all() and np.isfinite(root).all()
    ]
    value = float("nan")
    if len(pairs) > 1:
        ours, roots = (
            np.stack(side, axis=1).astype(np.float64) for side in zip(*pairs, strict=True)
        )
        value = float(np.mean([_cka(a, b) for a, b in zip(ours, roots, strict=True)]))
    return Value(value, unscored=len(states) - len(pairs))


def _cka(left: Float[np.ndarray, "rows width"], right: Float[np.ndarray, "rows width"]) -> float:
    """||right^T left||^2 / (||left^T left|| ||right^T right||) of centred columns, by row pairs."""
    kernels = []
    for states in (left, right):
        centred = states - states.mean(axis=0)
        kernels.append(centred @ centred.T)
    ours, root = kernels
    size = np.linalg.norm(ours) * np.linalg.norm(root)
    return float((ours * root).sum() / size) if size > 0 else float("nan")
