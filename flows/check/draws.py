"""Draws the examples of a run's missing nodes before any of them starts."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from base.errors import UserError
from evals.comparison.scores import EXAMPLES_SEED
from evals.statistics.power import fewest_examples
from evals.statistics.units import independent
from experts.domain import HELD_OUT, OWN_SUFFIX, TRAIN, Example
from experts.isolation.time_limit import processor_limit
from experts.loading import load_domain
from flows.plan.nodes import Node, StageGraph
from flows.plan.shifts import SHIFT
from flows.run_file.rounds import without_round
from flows.run_file.schema import BASE, BASELINES, COLD_START, STUDENT, VARIANTS
from stages.config.kinds import EVALUATIONS

REASONING_KIND = "reasoning"
# Processor time allowed for a third-party generator or scorer, including the import of reasoning-gym.
ONE_EXAMPLE_SECONDS = 60.0


def draw_examples(
    graph: StageGraph, missing: list[Node], warnings: list[str]
) -> tuple[dict[tuple[str, str], list[Example]], list[str]]:
    """Draw the examples of the missing nodes; the largest count of a domain and split covers all seeds.

    Args:
        graph: The run.
        missing: Nodes that have to run.
        warnings: Receives a line for each domain with fewer examples than requested.

    Returns:
        Examples by domain and split, and problems.
    """
    wanted: dict[tuple[str, str], tuple[int, int, str]] = defaultdict(lambda: (0, 0, ""))
    for node in missing:
        split = str(node.config.get("split", TRAIN))
        monitor = node.config.get("monitor")
        key = _examples_key(node)
        for domain in node.domains:
            seed = EXAMPLES_SEED if node.stage in EVALUATIONS else node.seed
            wanted[domain, split] = max(wanted[domain, split], (int(node.config["examples"]), seed, key))
            if monitor:
                asked = (int(monitor["examples"]), 0, f"{config_key(node)}.monitor.examples")
                wanted[domain, HELD_OUT] = max(wanted[domain, HELD_OUT], asked)
    found: dict[tuple[str, str], list[Example]] = {}
    problems = []
    for (name, split), (count, seed, key) in wanted.items():
        entry = graph.config.domains[name]
        try:
            source = load_domain(name, entry.kind, entry.options)
            own = entry.kind.endswith(OWN_SUFFIX)
            if own or entry.kind == REASONING_KIND:
                with processor_limit(ONE_EXAMPLE_SECONDS, f"domains.{name}: drawing one example with these options"):
                    source.draw_up_to(1, split, seed)
            drawn = source.draw_up_to(count, split, seed)
            if own and drawn and drawn[0].answer:
                # An invalid score would otherwise be found by the first step of RL.
                with processor_limit(ONE_EXAMPLE_SECONDS, f"domains.{name}: scoring one completion"):
                    source.score(drawn[0], drawn[0].answer)
        except (UserError, ConnectionError) as error:
            problems.append(f"{key} {count}: {error}")
            continue
        found[name, split] = drawn
        warnings += [line for line in source.left_out if line not in warnings]
        if not drawn:
            other = TRAIN if split == HELD_OUT else HELD_OUT
            problems.append(
                f"{key} {count}: domains.{name}: no {split} examples; split {other} has {source.supply(other)}"
            )
        elif len(drawn) < count:
            warnings.append(f"{key} {count}: domains.{name} has {len(drawn)} {split} examples; all of them are used")
    return found, problems


def unit_warnings(graph: StageGraph, draws: Mapping[tuple[str, str], Sequence[Example]]) -> Iterator[str]:
    """Yield a line for each domain with a teacher whose held-out examples have too few units to judge it.

    Args:
        graph: The run.
        draws: The examples that the missing nodes draw, by domain and split.
    """
    gate = graph.config.gate
    fewest = fewest_examples(gate.non_inferiority_margin, gate.confidence)
    for domain in graph.config.teachers():
        drawn = draws.get((domain, HELD_OUT), [])
        units = [example.source for example in drawn]
        if (worth := independent(units)) < min(fewest, len(drawn)):
            yield (
                f"domains.{domain}: the {len(drawn)} held_out examples are of {len(set(units))} units ({units[0]}, …), "
                f"worth {worth} examples; gate.non_inferiority_margin {gate.non_inferiority_margin:g} needs "
                f"{fewest}, even with equal answers: more data, or a larger held_out_share"
            )


def _examples_key(node: Node) -> str:
    """The run file's key of the number of a node's examples."""
    if node.stage == SHIFT:
        return "evaluate.shift.examples"
    return "evaluate.examples" if node.stage in EVALUATIONS else f"{config_key(node)}.examples"


def config_key(node: Node) -> str:
    """The run file's key of a training node's config."""
    if node.stage in EVALUATIONS:
        return "evaluate"
    kind, _, name = without_round(node.name).partition("/")
    if node.name.startswith((BASELINES, VARIANTS)):
        return f"merge.{kind}.{name}"
    keys = {BASE: "base.pretrain", COLD_START: "cold_start.sft", STUDENT: "merge"}
    return keys.get(kind, f"experts.{name}.train.{node.stage}")
