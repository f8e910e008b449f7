"""The attack that docs/audit.md shows is one."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from unlora.audits import attack as attacks
from unlora.cli.compose import composed
from unlora.config.audit_config import read_audit
from unlora.errors import InputError
from unlora.recipes.audit import attacks_of, thresholds_of
from unlora.registry import Index, NotNegative, Registry

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text("utf-8")


@pytest.fixture
def noise(monkeypatch):
    """The page's attack, in a registry that is gone afterwards."""
    known = attacks.ATTACKS
    own: Registry = Registry("attack", "unlora.audits.attacks")
    own._entries, own._is_complete = dict.fromkeys(known), True
    own._entries |= {name: known[name] for name in known}
    monkeypatch.setattr(attacks, "ATTACKS", own)
    monkeypatch.setattr("unlora.recipes.audit.ATTACKS", own)
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S))
    names = {"attack": attacks.attack, "MergedModel": attacks.MergedModel, "torch": torch,
             "NotNegative": NotNegative, "Index": Index}  # fmt: skip
    exec(code, names)
    return own["noise"]


def test_it_changes_the_weights_as_its_settings_say(noise):
    assert noise.kind == "merged"
    before = torch.randn(50, 40)
    network = nn.Linear(40, 50)
    for share, most in ((0.0, 0.0), (0.02, 0.1)):
        with torch.no_grad():
            network.weight.copy_(before)
            noise.fn(network, **noise.configured({"share": share}))
        changed = (network.weight - before).std() / before.std()
        assert share * 0.9 <= changed <= max(share * 1.1, most * 0)


def test_a_config_asks_for_it(noise):
    cfg = composed("audit", ["+audit.noise={handler: noise, share: 0.02}", "audit=none"])
    cfg.run = "run"
    assert attacks_of(read_audit(cfg))["noise"][1] == {"share": 0.02, "seed": 0}


@pytest.mark.parametrize("name", ["default", "quick", "full", "none"])
def test_the_shipped_audits_are_complete(name):
    cfg = composed("audit", [f"audit={name}"])
    cfg.run = "run"
    found = attacks_of(read_audit(cfg))
    assert next(iter(found)) == "plain"
    if name != "none":
        assert {attack.kind for attack, _ in found.values()} == set(attacks.KINDS.values())


def test_every_attack_of_the_page_is_a_shipped_one():
    table = PAGE[PAGE.index("## The attacks") : PAGE.index("## The dial")]
    named = {
        n for row in re.findall(r"^\| (`.*?) \|", table, re.M) for n in re.findall("`(.*?)`", row)
    }
    cfg = composed("audit", [])
    assert named == set(cfg.audit)


@pytest.mark.parametrize(
    "words, said",
    [
        (["audit.nf4.form=fp3"], "audit.nf4: Unknown form of attack quantise 'fp3'"),
        (["+audit.mine={handler: quantize}"], "audit.mine: Unknown attack 'quantize'. Did you"),
        (["+audit.mine={form: nf4}"], "audit.mine: it has no handler"),
        (["audit.relearn.steps=[20,5]"], "must rise"),
        (["thresholds.hiden=0.3"], "Did you mean 'hidden'"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, said):
    cfg = composed("audit", words)
    cfg.run = "run"
    config = read_audit(cfg)
    with pytest.raises(InputError, match=re.escape(said)):
        attacks_of(config), thresholds_of(config)
