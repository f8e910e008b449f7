"""Run a study as stages that know their inputs by content.

    settings -> plan -> waves of stages, each a process of Hydra's launcher -> summary, page

A stage trains a run or evaluates it. Its key is a hash of all that its result depends on: settings,
data, and the models and logs that it reads, by their content
(:mod:`unlora.studies.stage_fingerprints`). What it left is believed if its key and the hashes of
its files still hold; else it runs, from its last checkpoint where it was interrupted
(:mod:`unlora.studies.stage_run`).
"""
