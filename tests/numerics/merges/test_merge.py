"""The arithmetic of weight merges against hand-worked cases, an oracle of its own and peft's own methods."""

import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from pydantic import ValidationError

import stages.merge
from base.hashing import stable_hash
from stages.config.merge import WeightMergeConfig
from stages.merge import merge

METHODS = ["weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def method(name: str, **options: object) -> WeightMergeConfig:
    return WeightMergeConfig.model_validate({"method": name, **options})


# Two experts, by hand. Task vectors a and b; the start is not zero, so that adding it is seen.
START = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
A = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5])
B = torch.tensor([2.0, 5.0, -1.0, 3.0, 0.25])


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        (method("weight_average"), [1.0, 1.0], [3.0, 1.0, 0.5, 2.0, 0.375]),
        (method("weight_average"), [1.5, 0.5], [3.5, -1.0, 1.25, 1.5, 0.4375]),
        (method("task_arithmetic"), [1.0, 1.0], [2.4, 0.8, 0.4, 1.6, 0.3]),
        (method("task_arithmetic", scale=2.0), [1.5, 0.5], [14.0, -4.0, 5.0, 6.0, 1.75]),
        # Of five entries two stay: a keeps 4 and -3, b keeps 5 and 3. In the second +5 outvotes -3.
        (method("ties", density=0.4), [1.0, 1.0], [4.0, 5.0, 0.0, 3.0, 0.0]),
        # Nothing is trimmed: the third is a's alone, for 2 outvotes -1; where both agree their mean stays.
        (method("ties", density=1.0, scale=2.0), [1.0, 1.0], [6.0, 10.0, 4.0, 4.0, 0.75]),
        # Weights come after the election, as Yadav et al. elect by the trimmed vectors themselves.
        (method("ties", density=1.0), [1.5, 0.5], [3.5, 2.5, 3.0, 1.5, 0.4375]),
        (method("dare_linear", density=1.0, scale=1.0), [1.0, 1.0], [6.0, 2.0, 1.0, 4.0, 0.75]),
        (method("dare_ties", density=1.0), [1.0, 1.0], [3.0, 5.0, 2.0, 2.0, 0.375]),
    ],
)
def test_cases_worked_by_hand(config: WeightMergeConfig, weights: list[float], expected: list[float]) -> None:
    merged = merge(config, START, [START + A, START + B], weights, [0])
    torch.testing.assert_close(merged - START, torch.tensor(expected), rtol=0, atol=1e-5)


def oracle_ties(vectors: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    """TIES of flat task vectors [experts, entries], entry by entry."""
    kept = np.zeros_like(vectors)
    for row, vector in enumerate(vectors):
        largest = sorted(range(vector.size), key=lambda i: -abs(vector[i]))[: int(density * vector.size)]
        kept[row, largest] = vector[largest]
    merged = np.zeros(vectors.shape[1])
    for entry in range(vectors.shape[1]):
        elected = 1.0 if kept[:, entry].sum() >= 0 else -1.0
        agreeing = [row for row in range(len(kept)) if kept[row, entry] * elected > 0]
        if agreeing:
            merged[entry] = sum(weights[row] * kept[row, entry] for row in agreeing) / len(agreeing)
    return merged


def test_methods_agree_with_an_oracle() -> None:
    random = np.random.default_rng(0)
    start, vectors = random.normal(size=(7, 11)), random.normal(size=(3, 7, 11))
    weights = np.array([0.5, 1.5, 1.0])
    tensors = [torch.tensor(start + vector, dtype=torch.float32) for vector in vectors]

    def ours(config: WeightMergeConfig) -> np.ndarray:
        merged = merge(config, torch.tensor(start, dtype=torch.float32), tensors, weights.tolist(), [0])
        return (merged.double().numpy() - start).ravel()

    flat = vectors.reshape(3, -1)
    np.testing.assert_allclose(ours(method("weight_average")), weights @ flat / 3, atol=1e-5)
    np.testing.assert_allclose(ours(method("task_arithmetic")), 0.4 * weights @ flat, atol=1e-5)
    np.testing.assert_allclose(ours(method("ties", scale=0.7)), 0.7 * oracle_ties(flat, weights, 0.2), atol=1e-5)
    np.testing.assert_allclose(ours(method("ties", density=0.5)), oracle_ties(flat, weights, 0.5), atol=1e-5)
    # What DARE kept shows where one expert is merged by itself: the kept share, scaled up.
    alone = merge(method("dare_linear", density=0.5, scale=1.0), torch.zeros(77), [torch.ones(77)], [1.0], [3])
    assert set(alone.tolist()) == {0.0, 2.0}


def test_methods_are_pefts_own_in_slices(monkeypatch) -> None:
    monkeypatch.setattr(stages.merge, "_SLICE", 7)
    generator = torch.Generator().manual_seed(0)
    start, weights = torch.zeros(5, 6), [0.5, 1.5, 1.0]
    vectors = [torch.randn(5, 6, generator=generator) for _ in weights]
    for name in METHODS[2:]:
        config = method(name, density=0.3)
        torch.manual_seed(int(stable_hash([4, "w"])[:15], 16))
        expected = getattr(merge_utils, name)(vectors, config.scale * torch.tensor(weights), 0.3)
        torch.testing.assert_close(merge(config, start, vectors, weights, [4, "w"]), expected)


def test_dare_keeps_the_mean_and_its_seed_decides() -> None:
    start, vector = torch.zeros(40), torch.linspace(-1.0, 1.0, 40)
    config = method("dare_linear", density=0.25, scale=1.0)
    draws = [merge(config, start, [vector, 2 * vector], [1.0, 1.0], [seed, "w"]) for seed in range(2000)]
    # The standard error of each entry is at most sqrt(3 * (1 + 4) / 2000).
    torch.testing.assert_close(torch.stack(draws).mean(0), 3 * vector, rtol=0, atol=5 * math.sqrt(15 / 2000))
    again = merge(config, start, [vector, 2 * vector], [1.0, 1.0], [7, "w"])
    assert torch.equal(again, draws[7])
    assert not torch.equal(draws[7], draws[8])
    assert not torch.equal(merge(config, start, [vector, 2 * vector], [1.0, 1.0], [7, "v"]), draws[7])
    # Experts are not dropped in step: some entries come from one alone.
    assert {0.0, 4.0, 8.0, 12.0} == {round(float(x), 3) for x in draws[0] / vector}


def test_merging_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    merge(method("dare_ties"), START, [START + A], [1.0], [0])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "weight_average", "scale": 0.5}, "scale belongs to task_arithmetic, ties, dare_linear, dare_ties"),
        (
            {"method": "task_arithmetic", "density": 0.5},
            "density belongs to ties, dare_linear, dare_ties; the method is",
        ),
        ({"method": "ties", "density": 0.0}, "greater than 0"),
        ({"method": "tie"}, "weight_average"),
        ({"method": "ties", "densty": 0.2}, "densty"),
        ({"method": "ties", "weights": {"sort": 0}}, "weights.sort"),
    ],
)
def test_options_of_another_method_are_mistakes(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        WeightMergeConfig.model_validate(options)
    assert said in str(caught.value)


def test_a_method_brings_its_own_defaults() -> None:
    assert (method("ties").scale, method("ties").density) == (1.0, 0.2)
    assert (method("task_arithmetic").scale, method("task_arithmetic").density) == (0.4, None)
    assert method("dare_linear").scale == 0.4
    for name in METHODS:
        # As it travels to the stage's process.
        assert WeightMergeConfig.model_validate(method(name).model_dump(mode="json")) == method(name)
    assert method("ties", scale=1.0).key_fields() == method("ties").key_fields()
