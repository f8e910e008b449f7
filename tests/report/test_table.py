import pytest

from unlora.report.table import as_text, label, over_seeds


def results(**utilities):
    return {
        run: over_seeds(
            [{"model_utility": u, "forget_Q_A_Prob": 0.5} for u in values],
            ["model_utility", "forget_Q_A_Prob"],
        )
        for run, values in utilities.items()
    }


def test_means_are_over_seeds():
    found = over_seeds([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}], ["a", "b", "c"])
    assert found["a"] == {"mean": 2.0, "seeds": [1.0, 3.0]}
    assert found["b"] == {"mean": None, "seeds": [2.0, None]}, "not a mean of what is left"
    assert found["c"] == {"mean": None, "seeds": [None, None]}, "every run has every metric"


@pytest.mark.parametrize(
    "utility, expected", [(0.24, "collapsed"), (0.26, ""), (float("nan"), "collapsed")]
)
def test_collapsed_is_below_half_of_the_targets_utility(utility, expected):
    found = results(target=[0.4, 0.6], GradAscent=[utility])
    assert label("GradAscent", found) == expected
    assert label("target", found) == ""


@pytest.mark.parametrize("utility, expected", [(0.09, "collapsed"), (0.11, "")])
def test_without_a_target_collapsed_is_below_the_floor(utility, expected):
    assert label("NPO", results(NPO=[utility])) == expected


def test_a_run_without_a_utility_is_not_called_collapsed():
    assert label("NPO", {"NPO": {"model_utility": {"mean": None}}}) == ""


def test_collapsed_is_who_repeats_itself():
    found = results(target=[0.5], NPO=[0.5])
    found["NPO"]["retain_repetition"] = {"mean": 0.6}
    assert label("NPO", found) == "collapsed"


def test_the_table_has_a_line_for_each_run():
    text = as_text(results(target=[0.5], GradAscent=[1e-5]))
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["target", "GradAscent"]
    assert text.splitlines()[-1].endswith("collapsed") and "1.0e-05" in text


def test_the_figures_of_every_benchmark_have_a_column():
    muse = {"forget_verbmem_ROUGE": {"mean": 0.2, "seeds": [0.2]},
            "retain_knowmem_ROUGE": {"mean": 0.5, "seeds": [0.5]}}  # fmt: skip
    said = as_text({"NPO": muse})
    assert "0.200" in said and "0.500" in said
