"""How rows are split, drawn and seeded; and the optimizer's defaults."""

import itertools

import pytest

from stages.config.distill import DistillConfig
from stages.config.on_policy import RFTConfig, RLConfig
from stages.config.training import OptimizerConfig, PretrainConfig, SFTConfig, TrainConfig
from stages.learner.training import epochs, step_seed


def test_epochs_visit_every_item_once_each_in_orders_of_their_own():
    items = list(range(20))
    stream = list(itertools.islice(epochs(items, seed=3), 60))
    rounds = [stream[:20], stream[20:40], stream[40:]]
    assert all(sorted(part) == items for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert list(itertools.islice(epochs(items, 3, first=1), 20)) == rounds[1]


def test_step_seeds_differ_by_seed_step_and_purpose():
    seeds = {
        step_seed(seed, step, purpose) for seed in (0, 1) for step in (1, 2, 11) for purpose in ("sample", "torch")
    }
    assert len(seeds) == 12
    assert step_seed(1, 2, "sample") == step_seed(1, 2, "sample")


@pytest.mark.parametrize("stage", [PretrainConfig, SFTConfig, RLConfig, RFTConfig, DistillConfig])
def test_an_optimizer_keeps_the_stages_defaults_for_what_it_leaves_out(stage: type[TrainConfig]) -> None:
    default = stage().optimizer
    assert stage.model_validate({"optimizer": {}}).optimizer == default
    # In the form of a run file, and as an override makes it.
    narrow = stage.model_validate({"optimizer": {"states": "8bit", "warmup_steps": 7}}).optimizer
    assert narrow == default.model_copy(update={"states": "8bit", "warmup_steps": 7})
    whole = OptimizerConfig(learning_rate=0.5)
    assert stage(optimizer=whole).optimizer == whole
    assert stage.model_validate({"optimizer": whole.model_dump(mode="json")}).optimizer == whole
