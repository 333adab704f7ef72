"""Finds, before any training, copies of the examples to measure on among the examples to train on."""

from collections.abc import Iterator, Mapping, Sequence

from evals.comparison.copies import NEAR, NONE, Copies
from experts.domain import TRAIN, Example
from experts.loading import load_domain
from flows.plan.nodes import StageGraph
from stages.rows.trained_on import TrainedOn


def copy_warnings(graph: StageGraph, draws: Mapping[tuple[str, str], Sequence[Example]]) -> Iterator[str]:
    """Yield a line for each domain and split with examples that have a copy among the training examples of any domain.

    Args:
        graph: The run.
        draws: The examples that the missing nodes draw, by domain and split.
    """
    entries = graph.config.domains
    domains = {name: load_domain(name, entries[name].kind, entries[name].options) for name in {key[0] for key in draws}}
    trained = {name: drawn for (name, split), drawn in draws.items() if split == TRAIN}
    if not trained or len(trained) == len(draws):
        return
    copies = Copies(TrainedOn.of(domains, trained))
    for (name, split), drawn in draws.items():
        kinds = [] if split == TRAIN else copies.find(domains[name], drawn)
        if count := len(kinds) - kinds.count(NONE):
            near = f" ({kinds.count(NEAR)} of them near copies)" if NEAR in kinds else ""
            yield (
                f"domains.{name}: {count} of {len(kinds)} {split} examples have a copy among the examples to train "
                f"on{near}; they are counted as contaminated"
            )
