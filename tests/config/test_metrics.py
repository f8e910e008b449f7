"""Shipped metrics are offered to Hydra."""

import copy

from hydra.core.config_store import ConfigStore

from unlora.cli.compose import composed


def test_the_store_is_not_copied_and_no_config_changes_what_the_next_one_has():
    first = composed("eval/tofu", ["+paths.output_dir=first"])
    name = next(iter(first.eval.tofu.metrics))
    first.eval.tofu.metrics[name].handler = "changed"
    second = composed("eval/tofu", ["+paths.output_dir=second"])
    assert second.eval.tofu.metrics[name].handler != "changed"
    store = ConfigStore.instance().repo
    assert copy.deepcopy(store) is store
