"""A stage's run in the tracking store: its journal's records by step, and the checkpoint it makes."""

import json
import time
from typing import TYPE_CHECKING, Any, Literal

from base.hashing import stable_hash
from base.store.checkpoint import Artifact
from flows.lineage import descriptions
from flows.lineage.drawing import draw_html
from flows.plan.nodes import Node
from flows.run_file.schema import STUDENT
from flows.tracking.curves import tracked
from flows.tracking.writer import TAG_LENGTH

if TYPE_CHECKING:
    from flows.tracking.tracker import Tracker

NOTES, STOPPED_EARLY = "notes", "stopped_early"
Status = Literal["FINISHED", "FAILED", "KILLED"]


class StageRun:
    """The child run of one stage."""

    def __init__(self, tracker: "Tracker", node: Node) -> None:
        self.tracker = tracker
        self.node = node
        self._samples: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._position = (0, 0)

    def forward(self, records: list[dict[str, Any]]) -> None:
        """Log a journal's new records.

        Metrics are logged at once. Notes are logged at once as a tag, which has a limited length, and in full at the
        end. Samples are logged at the end.
        """
        values = [
            (name, value, int(record["time"] * 1000), record["step"])
            for record in records
            if record["kind"] == "metrics"
            for name, value in tracked(record["values"]).items()
        ]
        self.tracker.log_metrics(self.node.id, values)
        self._samples += [record for record in records if record["kind"] == "sample"]
        self._position = next(
            ((r["step"], r["total"]) for r in reversed(records) if r["kind"] == "progress"), self._position
        )
        if new := [f"step {record['step']}: {record['text']}" for record in records if record["kind"] == "note"]:
            self._notes += new
            self.tracker.submit("tag", ref=self.node.id, name=NOTES, value="\n".join(self._notes)[-TAG_LENGTH:])

    def finish(self, status: Status, artifact: Artifact | None) -> None:
        """Close the run. Its checkpoint, if it made one, becomes a LoggedModel with its parents as inputs."""
        tracker, ref = self.tracker, self.node.id
        step, total = self._position
        if status == "FINISHED" and step < total:
            tracker.submit("tag", ref=ref, name=STOPPED_EARLY, value=f"step {step} of {total}")
        if self._samples:
            tracker.submit("table", ref=ref, file="samples.json", table=descriptions.sample_table(self._samples))
        if self._notes:
            tracker.submit("text", ref=ref, file="notes.txt", text="\n".join(self._notes) + "\n")
        if artifact is not None:
            tracker.submit("made", ref=ref, key=artifact.key, time=now(), step=step)
            tracker.register(self.node, artifact)
            if self.node.name == STUDENT:
                drawn = draw_html(tracker.store, [artifact.key], f"{tracker.name} {ref}")
                tracker.submit("text", ref=ref, file="lineage.html", text=drawn)
                tracker.submit("model_text", key=artifact.key, file="lineage.html", text=drawn)
        tracker.submit("end", ref=ref, status=status, time=now())


class EvaluationRun(StageRun):
    """A measurement, which has no run of its own: its metrics are logged on the measured checkpoint."""

    def forward(self, records: list[dict[str, Any]]) -> None:
        """Log nothing, because the score sheet has every completion."""

    def finish(self, status: Status, artifact: Artifact | None) -> None:
        """Log the scores' metrics on the checkpoint."""
        if artifact is not None:
            self.tracker.scored(self.node, artifact)


def describe_data(node: Node, domain: str, split: str) -> dict[str, str]:
    """The name, digest and source of one split of a domain, or of a task of lm-evaluation-harness, as a dataset."""
    if node.stage == "harness":
        entry = {"kind": "lm-evaluation-harness", "options": node.config}
        fingerprint = stable_hash([node.config["task"], node.ingredients["harness"], node.ingredients["task"]])
    else:
        entry = dict(node.domains[domain])
        fingerprint = node.ingredients["domains"][domain]
    return {
        "name": f"{domain}/{split}",
        "digest": descriptions.dataset_digest(fingerprint),
        "kind": str(entry["kind"]),
        "source": json.dumps(entry["options"]),
        "profile": json.dumps({"fingerprint": fingerprint, "split": split}),
        "split": split,
    }


def now() -> int:
    """Milliseconds since the epoch, MLflow's unit of time."""
    return int(time.time() * 1000)
