"""Fingerprint all that the answers of a model depend on, without loading it."""

from importlib import metadata
from typing import Any

import torch

from unlora.model.hub import commit_of
from unlora.model.lineage import fingerprint
from unlora.model.load import pinned
from unlora.model.quantised import versions
from unlora.model.resolved import ResolvedModel
from unlora.runs.hashes import digest

# they say where weights are and how they come into memory, not what they are
NOT_OF_THE_MODEL = (
    "pretrained_model_name_or_path", "revision", "token", "cache_dir", "device_map",
    "local_files_only", "max_memory", "low_cpu_mem_usage", "use_safetensors", "trust_remote_code",
    "use_cache",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "peft")


def identities(model: ResolvedModel) -> tuple[str | None, str | None]:
    """Names of a model and of its root model: sha256 of weights, adapters, dtype and packages.

    None where the weights cannot be told from others: a hub repository that is not in the local
    cache yet.

    Raises:
        InputError: the model is out of reach, or its lineage is broken.
    """
    root, links, quantised_by = content_of(model)
    if not root:
        return None, None
    settings: dict[str, Any] = {
        k: v for k, v in model.load_kwargs.items() if k not in NOT_OF_THE_MODEL
    }
    settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    settings["packages"] = [metadata.version(package) for package in PACKAGES]
    settings["packages"] += quantised_by
    return digest(root, links, settings), digest(root, [], settings)


def content_of(model: ResolvedModel) -> tuple[str, list[tuple[str, str]], list[str]]:
    """What a model is made of, by content.

    Returns:
        A hash of the root's weights (of one on the hub its commit; an empty text where it is not in
        the local cache yet); the hashes of each adapter and of its settings; the versions of what
        dequantises the weights.
    """
    quantised = model.quantised  # of a hub model: brings its config into the local cache
    lineage = model.lineage
    if lineage.local_root:
        root = fingerprint(lineage.root)
    else:
        root = commit_of(lineage.root, pinned(lineage, model.load_kwargs)) or ""
    links = [(link.sha256, link.config_sha256) for link in lineage.links]
    return root, links, versions(quantised)
