"""Shipped metrics are offered to Hydra."""

import copy

from hydra.core.config_store import ConfigStore

from unlora.cli.compose import composed


def test_the_store_is_not_copied_and_no_config_changes_what_the_next_one_has():
    names = [f"eval/tofu_metrics={name}" for name in ("forget_Q_A_Prob", "forget_quality")]
    first = composed("eval/tofu", [*names[:1], "+paths.output_dir=first"])
    first.eval.tofu.metrics.forget_Q_A_Prob.handler = "changed"
    second = composed("eval/tofu", [*names[:1], "+paths.output_dir=second"])
    assert second.eval.tofu.metrics.forget_Q_A_Prob.handler != "changed"
    store = ConfigStore.instance().repo
    assert copy.deepcopy(store) is store
