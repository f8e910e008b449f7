"""Ask the models of an evidence folder again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.audits.scores import AuditScores
from unlora.cli.compose import composed
from unlora.config.audit_config import read_audit
from unlora.deletion.request_rows import DataSet
from unlora.deletion.request_stages import as_asked
from unlora.errors import InputError
from unlora.recipes import audit
from unlora.recipes.audited_run import ROOT
from unlora.results.audit_log import SCORES
from unlora.runs.safe_loading import read_json


def scores_again(facts: Mapping[str, Any], folder: Path) -> AuditScores:
    """The scores of an audit that asks plainly, and believes no answer that was kept.

    Raises:
        InputError: a model or the rows are not there any more.
    """
    models = facts["audit"]["models"]
    for role, path in models.items():
        if role != "retain" and not Path(path).is_dir():
            raise InputError(f"The {role} model {path!r} is not there, from where this was typed.")
    source = facts["request"]["source"]
    request = DataSet("forget", "request", source["declared"], source["datasets_dir"])
    cfg = composed("audit", ["audit=none"])
    cfg.run, cfg.target = models["unlearned"], models["target"]
    cfg.retain_model = None if facts["audit"]["baseline"] == ROOT else models["retain"]
    cfg.cache, cfg.output, cfg.output_dir = False, "quiet", str(folder)
    cfg.data = {"forget": as_asked(request)}
    audit.run(read_audit(cfg))
    return AuditScores.from_json(read_json(folder / SCORES))
