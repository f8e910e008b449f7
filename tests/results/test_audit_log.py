import pytest
from report_runs import audit, dial, form, write_json

from unlora.errors import InputError
from unlora.results.audit_log import read_audit
from unlora.results.dial_log import read_dial


def test_trainings_are_told_by_the_names_of_their_forms(tmp_path):
    names = ["relearn: learning rate 2e-05, step 5", "relearn: learning rate 0.001, step 60",
             "relearn: learning rate 0.001, step 20", "mine: learning rate 0.001, step 20",
             "relearn: learning rate fast, step 20", "wordings"]  # fmt: skip
    audit(tmp_path, "held", form("plain", 0.0), *(form(name, 0.1) for name in names))
    log = read_audit(tmp_path)
    assert {key: set(steps) for key, steps in log.trainings.items()} == {
        ("relearn", 2e-5): {5}, ("relearn", 0.001): {20, 60}, ("mine", 0.001): {20},
    }  # fmt: skip
    assert log.trainings["relearn", 0.001][60]["name"] == names[1]


def test_a_run_without_an_audit_has_none(tmp_path):
    assert read_audit(tmp_path) is None and read_dial(tmp_path) is None


@pytest.mark.parametrize(
    "changed, said",
    [({"attacks": []}, "no attacks"), ({"attacks": None}, "no attacks"),
     ({"attacks": ["plain"]}, "attack 1 is damaged"),
     ({"attacks": [form("plain", 0.1) | {"interval95": [0.1]}]}, "attack 1 is damaged"),
     ({"attacks": [form("plain", 0.1) | {"residual": "much"}]}, "attack 1 is damaged"),
     ({"attacks": [form("plain", 0.1) | {"name": None}]}, "attack 1 is damaged"),
     ({"held": {"value": "much"}}, "largest residual"), ({"verdict": {}}, "no verdict")],
)  # fmt: skip
def test_a_damaged_audit_is_named_and_can_be_repeated(changed, said, tmp_path):
    whole = {"verdict": {"name": "held", "sentence": "Held."}, "attacks": [form("plain", 0.1)]}
    write_json(tmp_path / "audit" / "AUDIT.json", whole | changed)
    with pytest.raises(InputError, match=said) as error:
        read_audit(tmp_path)
    assert "AUDIT.json" in str(error.value) and "unlora audit RUN" in str(error.value)


def test_a_chosen_scale_lies_between_its_neighbours(tmp_path):
    dial(tmp_path, 0.75)
    log = read_dial(tmp_path)
    assert log.scale == 0.75 and log.chosen == pytest.approx((0.0, 0.90))
    dial(tmp_path, None)
    assert read_dial(tmp_path).chosen is None


def test_scales_without_figures_are_no_points_of_the_curve(tmp_path):
    unknown = [{"scale": s, "residual": x, "retain": y} for s, x, y in
               ((0.0, 1.0, 0.9), (0.5, None, 0.9), (1.0, 0.1, None))]  # fmt: skip
    dial(tmp_path, curve=unknown)
    assert read_dial(tmp_path).curve == [(0.0, 1.0, 0.9)]


@pytest.mark.parametrize(
    "changed", [{"curve": None}, {"curve": [1]}, {"scale": "large"}, {"verdict": {}}]
)
def test_a_damaged_dial_is_named_and_can_be_repeated(changed, tmp_path):
    dial(tmp_path, **changed)
    with pytest.raises(InputError, match=r"DIAL\.json.*unlora dial RUN"):
        read_dial(tmp_path)
