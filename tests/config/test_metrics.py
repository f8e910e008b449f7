"""Shipped metrics are offered to Hydra."""

import copy

from hydra.core.config_store import ConfigStore

from unlora.cli.compose import composed


def test_the_store_is_not_copied_and_no_config_changes_what_the_next_one_has():
    words = ["experiment=eval/tofu/default"]
    first = composed("eval", words)
    first.eval.tofu.metrics.forget_Q_A_Prob.handler = "changed"
    second = composed("eval", words)
    assert second.eval.tofu.metrics.forget_Q_A_Prob.handler != "changed"
    store = ConfigStore.instance().repo
    assert copy.deepcopy(store) is store
