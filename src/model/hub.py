"""Look whether the hub answers, and which commit of a model is in its local cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

PATIENCE = 10.0  # seconds for an answer


def why_unreachable(repository: str, args: Mapping[str, Any]) -> Exception | None:
    """What stands between here and the hub, where a model is not in the local cache.

    transformers asks again and again for most of a minute, for two files after one another. This
    is one question; whether there is such a model is for transformers to say.

    Args:
        args: of ``from_pretrained``: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.
    """
    if args.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return None
    query = {key: args[key] for key in ("revision", "token") if key in args}
    try:
        if not commit_of(repository, args):
            HfApi().model_info(repository, timeout=PATIENCE, **query)
    except (HfHubHTTPError, HFValidationError):  # it answers, or this is no name
        return None
    except Exception as error:  # of requests, httpx or the system, as the hub's version has it
        return error
    return None


def commit_of(repository: str, args: Mapping[str, Any]) -> str | None:
    """The commit of a hub model in the local cache: the name of its folder there."""
    file = try_to_load_from_cache(
        repository, "config.json", cache_dir=args.get("cache_dir"), revision=args.get("revision")
    )
    return Path(file).parent.name if isinstance(file, str) else None
