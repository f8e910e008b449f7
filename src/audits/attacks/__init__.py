"""Attack a model: one file for each idea; see :mod:`unlora.audits.attack`."""
