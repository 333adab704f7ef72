"""Every objective of the merge on the same run: what each reaches, how soon, at what cost.

Each variant is the run file with a few keys of its merge changed. All variants have the same starts and teachers,
which are taken from the home `--from` if it has them, and otherwise made. Each has one student per seed.
Held-out scores are greedy and paired by example. Finished checkpoints stay in `--home`; after an interruption, repeat
the command to resume. The last line is each variant's seconds per step relative to the first's.

    python benchmarks/objectives.py [KEY=VALUE ...] [--variants reverse_kl sampled] [--seeds 0 1 2]
        [--run-file flows/runs/lab.yaml] [--from .mopd] [--home .mopd/objectives] [--parallel 2]
        [--report] [--json FILE]

KEY=VALUE are dotted overrides for all variants, such as merge.max_steps=100.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from objectives_table import Outcome, figures, ratios, read_outcome, sheets, table

from base.errors import UserError
from base.store.checkpoint import Store, write_whole
from flows.engines.launch import Launcher, NodeFailedError
from flows.plan.graph import build_graph
from flows.plan.nodes import Node, StageGraph
from flows.run.progress import duration
from flows.run_file.load import load_run_file
from flows.run_file.schema import STUDENT
from stages.learner.workspace import PACKAGES

VARIANTS: Mapping[str, Sequence[str]] = {
    "reverse_kl": ["objective.type=reverse_kl"],
    "forward_kl": ["objective.type=forward_kl"],
    "jsd": ["objective.type=jsd"],
    "entropy_aware": ["objective.type=entropy_aware"],
    "top_k": ["objective.top_k={k: 8, support: teacher, remainder: tail}"],
    "top_k_student": ["objective.top_k={k: 8, support: student, remainder: renormalise}"],
    "sampled": ["objective.type=sampled_reverse_kl"],
    # With one update a batch every ratio is 1 and all corrections are the same; with two they may differ.
    "sampled_twice": ["objective.type=sampled_reverse_kl", "updates_per_batch=2"],
    "sampled_twice_tis": ["objective.type=sampled_reverse_kl", "updates_per_batch=2", "objective.importance=truncate"],
    # A quarter of the prompts with four completions each: as many rows a step as the others in the lab run.
    "reward": ["objective.outcome_weight=0.5", "group_size=4", "prompts_per_step=20"],
    "extrapolation": ["objective.extrapolation=1.25"],
    "reference_kl": ["objective.reference_kl=0.01"],
    "golden": ["objective.golden_share=0.1"],
    "off_policy": ["on_policy_fraction=0.0"],
    "half_off_policy": ["on_policy_fraction=0.5"],
    "domain_mean": ["loss_normalisation=domain"],
}


class Bench:
    """The variants' graphs over one store, and what makes them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.home: Path = arguments.home
        self.store = Store(self.home)
        self.parallel: int = arguments.parallel
        monitor = f"{{every: {arguments.every}, examples: {arguments.examples}}}"
        common = [f"seeds={arguments.seeds}", "evaluate.samples=0", f"merge.monitor={monitor}", *arguments.overrides]
        self.graphs = {
            name: build_graph(load_run_file(arguments.run_file, [*common, *_of_merge(VARIANTS[name])]), self.home)
            for name in arguments.variants
        }
        self.failed = False
        self._saying = threading.Lock()

    def make(self, given: Store | None) -> None:
        """Make what is missing, shared nodes first. A student that fails is named and the others go on.

        Args:
            given: Where checkpoints that are not students may be taken over from.

        Raises:
            NodeFailedError: a shared node failed.
        """
        resources = next(iter(self.graphs.values())).config.resources
        with Launcher(self.home, resources) as launcher, ThreadPoolExecutor(self.parallel) as pool:
            try:
                for level in self._shared_levels():
                    list(pool.map(lambda job: self._make_shared(launcher, given, *job), level))
                list(pool.map(lambda job: self._make_student(launcher, *job), self._students()))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                launcher.stop_all()
                raise

    def _shared_levels(self) -> list[list[tuple[StageGraph, Node]]]:
        """All checkpoints but the students, each once, by the number of stages before it."""
        levels: dict[int, dict[str, tuple[StageGraph, Node]]] = {}
        for graph in self.graphs.values():
            depth: dict[str, int] = {}
            for node in graph.checkpoints:
                depth[node.id] = 1 + max((depth[parent] for parent in node.parents.values()), default=0)
                if node.name != STUDENT:
                    levels.setdefault(depth[node.id], {}).setdefault(node.key, (graph, node))
        return [list(levels[number].values()) for number in sorted(levels)]

    def _students(self) -> list[tuple[str, Node]]:
        """Every variant's students, the first seed of all variants first."""
        found = [(name, node) for name, graph in self.graphs.items() for node in graph.checkpoints]
        return sorted(((name, node) for name, node in found if node.name == STUDENT), key=lambda job: job[1].seed)

    def _make_shared(self, launcher: Launcher, given: Store | None, graph: StageGraph, node: Node) -> None:
        if self.store.find(node.key) is None and given is not None and given.find(node.key) is not None:
            folder = self.store.staging(node.key)
            shutil.copytree(given.root / node.key, folder, dirs_exist_ok=True)
            os.rename(folder, self.store.root / node.key)
            self.store.get(node.key)
        self._run(launcher, graph, [node], node.id)
        self._run(launcher, graph, sheets(graph, node), f"eval/{node.id}")

    def _make_student(self, launcher: Launcher, name: str, node: Node) -> None:
        graph = self.graphs[name]
        try:
            self._run(launcher, graph, [node], f"{name}/{node.id}")
            self._run(launcher, graph, sheets(graph, node), f"{name}/eval/{node.id}")
        except NodeFailedError as error:
            self.failed = True
            self._say(f"{name}: {error}")

    def _run(self, launcher: Launcher, graph: StageGraph, nodes: Sequence[Node], label: str) -> None:
        missing = [node for node in nodes if self.store.find(node.key) is None]
        if not missing:
            return
        started = time.monotonic()
        launcher.run(graph, missing, lambda node, records: None)
        self._say(f"{label}: made in {duration(time.monotonic() - started)}")

    def _say(self, text: str) -> None:
        with self._saying:
            print(text, file=sys.stderr, flush=True)


def _of_merge(overrides: Sequence[str]) -> list[str]:
    return [f"merge.{override}" for override in overrides]


def machine() -> str:
    """Where the figures are from."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES[:2])
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    home = Path(os.environ.get("MOPD_HOME", ".mopd"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for all variants")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--run-file", type=Path, default=Path(__file__).parent.parent / "flows/runs/lab.yaml")
    parser.add_argument("--from", type=Path, default=home, dest="given", help="home to take start and experts from")
    parser.add_argument("--home", type=Path, default=home / "objectives", help="where the students go")
    parser.add_argument("--every", type=int, default=25, help="steps between two points of a learning curve")
    parser.add_argument("--examples", type=int, default=100, help="examples of each domain in a point")
    parser.add_argument("--parallel", type=int, default=2, help="students trained at one time")
    parser.add_argument("--report", action="store_true", help="make nothing; print what is finished")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_intermixed_args(arguments)


def report(bench: Bench, arguments: argparse.Namespace) -> list[Outcome]:
    """Read what is finished and write the JSON file."""
    found = (read_outcome(name, graph, bench.store) for name, graph in bench.graphs.items())
    outcomes = [outcome for outcome in found if outcome is not None]
    if arguments.json and outcomes:
        whole = {
            "machine": machine(),
            "run_file": str(arguments.run_file),
            "overrides": arguments.overrides,
            "parallel": arguments.parallel,
            "variants": {
                name: {"changed": _of_merge(VARIANTS[name]), **row} for name, row in figures(outcomes).items()
            },
        }
        write_whole(arguments.json, json.dumps(whole, indent=1) + "\n")
    return outcomes


def main() -> int:
    """Make what is missing and print the table."""
    arguments = parse()
    try:
        bench = Bench(arguments)
        given = Store(arguments.given) if (arguments.given / "store").is_dir() else None
        try:
            if not arguments.report:
                bench.make(given)
        except NodeFailedError as error:
            bench.failed = True
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            bench.failed = True
            print("stopped; the same command resumes from here", file=sys.stderr)
        outcomes = report(bench, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if outcomes:
        print(f"{machine()}; {arguments.run_file.name} {' '.join(arguments.overrides)}\n")
        print(f"{table(outcomes)}\n\n{ratios(outcomes)}")
    return 1 if bench.failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
