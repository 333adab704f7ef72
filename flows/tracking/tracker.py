"""The record of a run in MLflow: runs, metrics, checkpoints with their parents, and the registered student.

Each pipeline run is a parent run and each stage that trained a child run; a cached stage is linked, not repeated. An
evaluation has no run of its own, because there would be too many: its metrics are logged on the scored LoggedModel,
each with its dataset. Every record is an operation in the outbox (`flows.tracking.outbox`), which
`flows.tracking.writer` applies to MLflow. So any thread may submit records, and an unreachable server neither stops a
run nor loses a record.
"""

import dataclasses
import getpass
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.store.checkpoint import Artifact, Store
from experts.domain import TRAIN
from flows.lineage import descriptions
from flows.lineage.drawing import draw_html
from flows.plan.champion_history import registered_name
from flows.plan.lock import code_fingerprint, lock_path
from flows.plan.nodes import Node, StageGraph
from flows.plan.shifts import SHIFT
from flows.run_file.schema import BASELINES, STUDENT, VARIANTS
from flows.servers.pages import run_page
from flows.servers.standing import standing
from flows.servers.start import MLFLOW_PORT, local_url, without_secrets
from flows.tracking.aliases import alias_operations
from flows.tracking.checkout import git_tags
from flows.tracking.curves import References
from flows.tracking.outbox import Outbox, send_left_over
from flows.tracking.stage_runs import EvaluationRun, StageRun, Status, describe_data, now
from flows.tracking.writer import Writer, unsent_folder
from stages.config.kinds import EVALUATIONS

if TYPE_CHECKING:
    from evals.comparison.results import Results
    from evals.promotion.gate import GateVerdict

BATCH_METRICS, BATCH_PARAMS, PARAM_LENGTH = 1000, 100, 6000
PARENT = "run"
VERDICT, MEAN_TAG = "verdict", "mean"


class Tracker:
    """One pipeline run in MLflow. Its methods may be called from several threads.

    Attributes:
        name: Name of the run.
        store: The store of the artifacts.
        page: URL of the flow run in Prefect's pages; empty if there is none.
    """

    def __init__(self, graph: StageGraph, home: Path) -> None:
        self.name = graph.config.name
        self.store = Store(home)
        self.graph = graph
        self.page = ""
        self.title = graph.config.name
        self.writer = Writer(self.store)
        self.token = uuid.uuid4().hex
        self._known: dict[str, Artifact] = {}
        folder = unsent_folder(home, self.name)
        send_left_over(folder, self.writer)
        self.outbox = Outbox(folder / f"{self.token}.jsonl", self.writer)
        self.submit("close_killed")
        self.references = References(graph, self.log_metrics, now)

    @classmethod
    def start(cls, graph: StageGraph, home: Path, run_file: Path, page: str = "", title: str = "") -> "Tracker":
        """Open the parent run, after sending what earlier runs of this name could not.

        Args:
            graph: The planned run.
            home: `$MOPD_HOME`.
            run_file: The run file, which is logged as an artifact.
            page: URL of the flow run in Prefect's pages.
            title: Name of the parent run; the run's name when empty.
        """
        tracker = cls(graph, home)
        config = graph.config
        tracker.title = title or config.name
        tags = {"name": config.name, "seeds": json.dumps(config.seeds), "code": code_fingerprint()}
        tags |= git_tags(run_file.resolve().parent)
        if page:
            tracker.page, tags["prefect"] = page, page
        tracker.open_run(PARENT, tracker.title, None, tags, config.model_dump(mode="json"))
        tracker.submit("text", ref=PARENT, file="run.yaml", text=run_file.read_text())
        lock = lock_path(home, config.name)
        if lock.exists():
            tracker.submit("text", ref=PARENT, file="lock.json", text=lock.read_text())
        return tracker

    @property
    def run_id(self) -> str:
        """MLflow's id of the parent run; empty while the server has not been reached."""
        return self.outbox.ids.get(PARENT, "")

    @property
    def url(self) -> str:
        """URL of the parent run, with a hint if no server runs; empty while the server has not been reached."""
        if not self.run_id:
            return ""
        if self.writer.uri.startswith("http"):
            return run_page(without_secrets(self.writer.uri).rstrip("/"), self.writer.experiment, self.run_id)
        if served := standing(self.store.home, "mlflow"):
            return run_page(served, self.writer.experiment, self.run_id)
        return f"{run_page(local_url(MLFLOW_PORT), self.writer.experiment, self.run_id)} (after `mopd ui`)"

    @property
    def unsent(self) -> int:
        """Number of operations the server has not accepted; after `finish` they are in the run's `unsent` folder."""
        return self.outbox.unsent

    def stage_started(self, node: Node) -> "StageRun":
        """Open the child run of a stage and log its datasets. An evaluation opens no run."""
        if node.stage in EVALUATIONS:
            return EvaluationRun(self, node)
        tags = {"key": node.key, "stage": node.stage, "seed": str(node.seed), "node": node.id}
        self.open_run(node.id, node.id, PARENT, tags, {"seed": node.seed, **node.config})
        if node.domains:
            datasets = [describe_data(node, domain, TRAIN) for domain in node.domains]
            self.submit("datasets", ref=node.id, datasets=datasets)
        self.references.begin(node)
        return StageRun(self, node)

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Link an artifact of an earlier run: its LoggedModel becomes an input of the parent run."""
        if node.stage in EVALUATIONS:
            self.scored(node, artifact)
            return
        self.submit("used", ref=PARENT, key=artifact.key)
        self.register(node, artifact)

    def finish(
        self,
        status: Status,
        results: "Results | None",
        report: Path | None,
        candidate: Node | None = None,
        verdict: "GateVerdict | None" = None,
    ) -> None:
        """Log the run's results and close it. Records the server did not accept are sent at the next start.

        Args:
            status: How the run ended.
            results: The comparison of base, teachers and student.
            report: The HTML report; the data it links to is in the same folder.
            candidate: The merge that the gate judged, which gets the alias `candidate`. The alias `champion` goes to
                the current champion.
            verdict: The gate's verdict on the candidate.
        """
        if results is not None:
            self._headline(results, verdict)
        made = [node.key for node in self.graph.checkpoints if self.store.find(node.key)]
        pages = {"lineage.html": draw_html(self.store, made, self.name)} if made else {}
        if report is not None:
            from evals.report.export import DATA_FILE, SCORES_FILE

            pages[report.name] = report.read_text()
            for file in (SCORES_FILE, DATA_FILE):
                self.submit("text", ref=PARENT, file=file, text=report.with_name(file).read_text())
        students = {node.key for node in self.graph.checkpoints if node.name == STUDENT and node.id in self._known}
        if candidate is not None:
            for operation in alias_operations(self.name, candidate):
                self.outbox.submit(operation)
            students.add(candidate.key)
        for file, text in pages.items():
            self.submit("text", ref=PARENT, file=file, text=text)
            for key in sorted(students):
                self.submit("model_text", key=key, file=file, text=text)
        if results is not None:
            self._compare(results, candidate, verdict, report is not None)
        self.submit("note", ref=PARENT, keys=made, page=self.page)
        self.submit("pages", ref=PARENT, run=self.name)
        self.submit("end", ref=PARENT, status=status, time=now())
        self.outbox.close()

    def _headline(self, results: "Results", verdict: "GateVerdict | None") -> None:
        """Log the parent run's metrics, and the tags that distinguish runs in MLflow's list of runs."""
        from evals.comparison.headline import MEAN, headline

        found = headline(results)
        self.log_metrics(PARENT, [(name, value, now(), 0) for name, value in found.items()])
        if MEAN in found:
            self.submit("tag", ref=PARENT, name=MEAN_TAG, value=f"{found[MEAN]:.1%}")
        if verdict is not None:
            self.submit("tag", ref=PARENT, name=VERDICT, value=verdict.conclusion)

    def _compare(
        self, results: "Results", candidate: Node | None, verdict: "GateVerdict | None", reported: bool
    ) -> None:
        """Log teacher, start and recovery beside each merge's own scores, and the verdict on the candidate."""
        from evals.comparison.headline import compared

        for node in self.graph.checkpoints:
            if node.name != STUDENT and not node.name.startswith((BASELINES, VARIANTS)):
                continue
            rows = [dataclasses.asdict(row) for row in compared(results, node.name, node.seed)]
            judged = verdict is not None and candidate is not None and node.key == candidate.key
            if rows and self.store.find(node.key):
                conclusion = verdict.conclusion if verdict is not None and judged else ""
                about = {"rows": rows, "verdict": conclusion, "title": self.title, "report": reported}
                self.submit("compared", ref=PARENT, key=node.key, **about)

    def submit(self, op: str, **fields: Any) -> None:
        """Submit one operation to the outbox, which applies it now or when the server can be reached."""
        self.outbox.submit({"op": op, **fields})

    def open_run(
        self, ref: str, name: str, parent: str | None, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        """Open a run with the reference `ref` and log its parameters."""
        everywhere = {"home": str(self.store.home.resolve()), "token": self.token, "name": self.name}
        everywhere |= {"host": os.uname().nodename, "mlflow.user": _user()}
        self.submit("run", ref=ref, name=name, parent=parent, tags={**everywhere, **tags}, time=now())
        flat = list(descriptions.flatten(params).items())
        for first in range(0, len(flat), BATCH_PARAMS):
            chunk = {name: value[:PARAM_LENGTH] for name, value in flat[first : first + BATCH_PARAMS]}
            self.submit("params", ref=ref, params=chunk)

    def log_metrics(self, ref: str, values: list[tuple[str, float, int, int]]) -> None:
        """Log (name, value, milliseconds, step) on a run, in batches of the size that one request allows."""
        named = [(descriptions.metric_name(name), *rest) for name, *rest in values]
        for first in range(0, len(named), BATCH_METRICS):
            self.submit("metrics", ref=ref, metrics=named[first : first + BATCH_METRICS])

    def scored(self, node: Node, artifact: Artifact) -> None:
        """Log the metrics of a measurement on the measured checkpoint, once.

        A measurement of several checkpoints is left out; its metrics are the parent run's.
        """
        if "checkpoint" not in node.parents:
            return
        self.references.score(node, artifact)
        if node.stage == SHIFT:
            key, metrics = self.graph.node(node.parents["checkpoint"]).key, artifact.manifest["metrics"]
            named = {descriptions.metric_name(name): value for name, value in metrics.items()}
            fields = {"key": key, "scores": artifact.key, "name": node.stage, "metrics": named}
            self.submit("scores", ref=PARENT, **fields, time=now())
            return
        domain, split = node.config["domain"], node.config["split"]
        checkpoint = self.graph.node(node.parents["checkpoint"])
        metrics = {
            descriptions.metric_name(f"eval/{domain}/{split}/{name}"): value
            for name, value in artifact.manifest["metrics"].items()
        }
        data = describe_data(node, domain, split)
        about = {"key": checkpoint.key, "scores": artifact.key, "data": data}
        self.submit("scores", ref=PARENT, **about, metrics=metrics, time=now())

    def register(self, node: Node, artifact: Artifact) -> None:
        """Make a student's checkpoint a version of the registered model."""
        if node.name != STUDENT:
            return
        self._known[node.id] = artifact
        self.submit("version", name=registered_name(self.name), key=artifact.key, seed=str(node.seed))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user id has no name
