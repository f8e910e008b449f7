"""Attack an unlearned model, and say how much of what was to be forgotten is still there.

    attack -> scores of every forget row, of three models -> residual -> verdict

The three are the *unlearned* model, the *target* (before unlearning) and the *retain model* (never
trained on the forget rows), each under the same attack. An attack is one function
(:mod:`unlora.audits.attack`); only :mod:`unlora.audits.attack_runner` calls a model.
"""
