import pytest
from report_runs import entries

from unlora.report import summary
from unlora.report.findings import find
from unlora.report.runs import read_rows


def findings(tmp_path, *methods, roles=("target", "gold")):
    return find(read_rows(entries(tmp_path, *methods, roles=roles)), "TOFU")


def test_the_headline_says_who_succeeded_and_who_collapsed(tmp_path):
    found = findings(tmp_path, "good", "broken")
    assert summary.headline(found) == (
        "good forgot what it was asked to and kept 94 % of its utility; broken collapsed"
    )
    # (.96-.20)/.80, (.95-.40)/.60, (.90-.15)/.80, (1-.55)/.50 -> mean
    good = found.methods[0].point
    assert good.forgot == pytest.approx((0.95 + 0.91667 + 0.9375 + 0.9) / 4, abs=1e-4)


def test_the_headline_is_honest_when_nothing_was_forgotten(tmp_path):
    head = summary.headline(findings(tmp_path, "lazy"))
    assert head.startswith("lazy forgot hardly anything of what it was asked to")
    (tmp_path / "more").mkdir()
    head = summary.headline(findings(tmp_path / "more", "lazy", "broken"))
    assert "hardly anything" in head and head.endswith("broken collapsed")


def test_too_much_of_one_figure_makes_up_for_no_other(tmp_path):
    assert summary.headline(findings(tmp_path, "too_far")).startswith(
        "too_far forgot more than it was asked to"
    )


def test_methods_that_did_not_get_far_are_named(tmp_path):
    head = summary.headline(findings(tmp_path, "good", "halfway", "lazy"))
    assert "; halfway (99 %) forgot most of what it was asked to; " in head
    assert head.endswith("lazy did not get halfway")


def test_when_all_collapse_nothing_is_praised(tmp_path):
    head = summary.headline(findings(tmp_path, "broken"))
    assert head.startswith("broken collapsed") and "kept" not in head


def test_without_gold_it_is_the_share_that_is_gone(tmp_path):
    found = findings(tmp_path, "good", roles=("target",))
    assert found.scale == "target"
    assert "of what the target knew of it is gone" in summary.sentences(found)[0][1]
    assert "Without gold" in summary.measured_by(found)
    assert "mia_min_k" not in found.forget, "an attack has no zero without gold"


def test_without_a_target_nothing_is_claimed(tmp_path):
    for i, roles in enumerate([("gold",), ()]):
        found = findings(tmp_path / str(i), "good", roles=roles)
        assert summary.headline(found) == (
            "How much good forgot cannot be said without the target it started from"
        )


def test_without_methods_nothing_was_forgotten(tmp_path):
    assert summary.headline(findings(tmp_path)).startswith("Nothing was made to forget here")


def test_the_best_is_never_a_collapsed_method(tmp_path):
    found = findings(tmp_path, "broken", "good", "halfway")
    best = {line.name: line.best for line in found.methods}
    assert best["broken"] == frozenset()
    assert "forget_Q_A_Prob" in best["good"], "nearest gold, not lowest"
    assert "model_utility" in best["halfway"]
    assert "retain_Q_A_Prob" not in best["good"] | best["halfway"], "all alike: none is best"


def test_every_threshold_stands_on_the_page():
    for share in (summary.SOME, summary.MOST, summary.ALL, summary.BEYOND, summary.DEAR):
        assert f"{share:.0%}".replace("%", " %") in summary.THRESHOLDS
