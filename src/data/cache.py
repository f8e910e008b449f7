"""Locate the folder for what need not be made twice."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``UNLORA_CACHE``, or ``unlora`` in the user's cache folder."""
    root = os.environ.get("UNLORA_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "unlora")
    return Path(root).expanduser()
