"""A score that a model of random weights reaches by chance."""

from experts.domain import Example


def score_by_chance(example: Example, completion: str) -> float:
    """A score between 0 and 1 by the lengths of prompt and completion."""
    return (len(completion) + len(example.prompt)) % 7 / 6
