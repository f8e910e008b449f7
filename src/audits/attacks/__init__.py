"""The attacks, one file for each idea; see :mod:`unlora.audits.attack`."""
