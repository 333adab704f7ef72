"""Applies a tracker's operations to MLflow; with `flows.tracking.models` the only module that imports mlflow.

An operation names runs by reference and checkpoints by content key. Both are resolved when the operation is applied,
which may be long after it was submitted. Applying an operation twice is harmless: checkpoints are found by their key,
scores and versions by a tag.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from base.store.checkpoint import Artifact, Store
from flows.lineage import descriptions
from flows.plan.champion_history import CHAMPION_ALIAS, read_history, registered_name
from flows.servers.pages import model_page, run_page, save_pages, version_page
from flows.servers.start import mlflow_artifacts, mlflow_environment, mlflow_uri, without_secrets
from flows.tracking.models import NOTE, SOURCE, STEP, LoggedCheckpoints, note_within, tracking_store
from flows.tracking.outbox import Doubtful, Operation, Rejected, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "mopd"
KIND = "mlflow.experimentKind"
TAG_LENGTH = 5000
HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")
# The server is overloaded or requires another password: temporary faults, which time or the user resolves.
PASSING = (
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
    "RESOURCE_CONFLICT",
    "PERMISSION_DENIED",
    "CUSTOMER_UNAUTHORIZED",
    "UNAUTHENTICATED",
)


class Writer:
    """Applies operations. It connects at the first one, because a server may be down when a run starts.

    Attributes:
        uri: The tracking store.
        experiment: MLflow's id of the one experiment with all runs; empty before the first connection.
    """

    def __init__(self, store: Store) -> None:
        os.environ.update(mlflow_environment())
        self.store = store
        self.uri = mlflow_uri(store.home)
        self.experiment = ""
        self._client: MlflowClient | None = None
        self._checkpoints: LoggedCheckpoints | None = None
        self._handlers: dict[str, Callable[[Operation, dict[str, str]], None]] = {
            "run": self._run,
            "params": self._params,
            "metrics": self._metrics,
            "datasets": self._datasets,
            "text": self._text,
            "table": self._table,
            "made": self._made,
            "used": self._used,
            "scores": self._scores,
            "model_text": self._model_text,
            "version": self._version,
            "alias": self._alias,
            "champion": self._champion,
            "compared": self._compared,
            "pages": self._pages,
            "close_killed": self._close_killed,
            "note": self._note,
            "tag": self._tag,
            "end": self._end,
        }

    def __call__(self, operation: Operation, ids: dict[str, str]) -> None:
        """Apply one operation.

        Args:
            operation: `op` and its fields.
            ids: reference -> MLflow's run id; the id of a new run is added.

        Raises:
            Unreachable: the server may accept it later.
            Doubtful: the server answers but does not accept it, and the error may be temporary or permanent.
            Rejected: the server will never accept it.
        """
        try:
            with tracking_store(self.uri):
                self._handlers[operation["op"]](operation, ids)
        except Rejected:
            raise
        except Exception as error:
            # Any error: clients of artifact stores raise their own, and saved operations may be of another version.
            raise self._fault(error)(without_secrets(f"{type(error).__name__}: {error}")) from error

    def _fault(self, error: Exception) -> type[Unreachable] | type[Rejected]:
        """The exception that classifies an operation's error."""
        from mlflow.exceptions import MlflowException

        # Before the first connection any server may be behind the URI; an OSError is a failed connection or full disk.
        if self._client is None or isinstance(error, OSError):
            return Unreachable
        if isinstance(error, MlflowException):
            if error.error_code in HOPELESS:
                return Rejected
            if error.error_code in PASSING:
                return Unreachable
        try:
            self._client.get_experiment(self.experiment)
        except (MlflowException, OSError):
            return Unreachable
        return Doubtful

    @property
    def client(self) -> "MlflowClient":
        """The connection. The first one migrates a new database under a lock, as concurrent migrations would fail."""
        if self._client is None:
            import mlflow

            # MLflow logs the traceback of every database fault and then raises it as well.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            with self.store.lock("mlflow"), tracking_store(self.uri):
                client = mlflow.MlflowClient(self.uri)
                known = client.get_experiment_by_name(EXPERIMENT)
                local = mlflow_artifacts(self.store.home).as_uri() if self.uri.startswith("sqlite") else None
                tags = {KIND: "custom_model_development"}
                self.experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, local, tags)
            self._client = client
        return self._client

    @property
    def checkpoints(self) -> LoggedCheckpoints:
        """The checkpoints of the experiment."""
        if self._checkpoints is None:
            client = self.client
            self._checkpoints = LoggedCheckpoints(client, self.experiment, self.store)
        return self._checkpoints

    def _run(self, operation: Operation, ids: dict[str, str]) -> None:
        tags = SOURCE | operation["tags"]
        if operation["parent"]:
            tags["mlflow.parentRunId"] = _run_id(operation["parent"], ids)
        run = self.client.create_run(self.experiment, operation["time"], tags, operation["name"])
        ids[operation["ref"]] = run.info.run_id

    def _params(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in operation["params"].items()]
        self.client.log_batch(_run_id(operation["ref"], ids), params=params)

    def _metrics(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(*fields) for fields in operation["metrics"]]
        self.client.log_batch(_run_id(operation["ref"], ids), metrics=metrics)

    def _datasets(self, operation: Operation, ids: dict[str, str]) -> None:
        self._log_datasets(_run_id(operation["ref"], ids), operation["datasets"])

    def _log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for data in datasets:
            dataset = Dataset(data["name"], data["digest"], data["kind"], data["source"], profile=data["profile"])
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", data["split"])]))
        self.client.log_inputs(run_id, datasets=inputs)

    def _text(self, operation: Operation, ids: dict[str, str]) -> None:
        self.client.log_text(_run_id(operation["ref"], ids), operation["text"], operation["file"])

    def _table(self, operation: Operation, ids: dict[str, str]) -> None:
        self.checkpoints.log_table(_run_id(operation["ref"], ids), operation["file"], operation["table"])

    def _made(self, operation: Operation, ids: dict[str, str]) -> None:
        artifact = self.store.find(operation["key"])
        if artifact is None:
            raise Rejected(f"checkpoint {operation['key']} is no longer in the store")
        self.checkpoints.record(artifact, _run_id(operation["ref"], ids), operation["time"], operation.get("step", 0))

    def _used(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import LoggedModelInput

        if model := self.checkpoints.model(operation["key"]):
            self.client.log_inputs(_run_id(operation["ref"], ids), models=[LoggedModelInput(model)])

    def _scores(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        # Scores are of one split of a domain, so they have a dataset; other measurements have none.
        model_id, data = self.checkpoints.model(operation["key"]), operation.get("data")
        if model_id is None:
            raise Rejected(f"checkpoint {operation['key']} is no longer in the store")
        tag = f"scores.{data['name']}" if data else operation["name"]
        model = self.client.get_logged_model(model_id)
        if model.tags.get(tag) == operation["scores"]:
            return
        run_id = self.checkpoints.maker(model) or _run_id(operation["ref"], ids)
        about = {"model_id": model_id}
        if data:
            self._log_datasets(run_id, [data])
            about |= {"dataset_name": data["name"], "dataset_digest": data["digest"]}
        metrics = [
            Metric(name, value, operation["time"], int(model.tags.get(STEP, 0)), run_id=run_id, **about)
            for name, value in operation["metrics"].items()
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        self.client.set_logged_model_tags(model_id, {tag: operation["scores"]})

    def _model_text(self, operation: Operation, ids: dict[str, str]) -> None:
        if model := self.checkpoints.model(operation["key"]):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / operation["file"]
                path.write_text(operation["text"])
                self.client.log_model_artifact(model, str(path))

    def _version(self, operation: Operation, ids: dict[str, str]) -> None:
        self.checkpoints.register(operation["name"], operation["key"], operation["seed"])

    def _alias(self, operation: Operation, ids: dict[str, str]) -> None:
        version = self.checkpoints.version(operation["name"], operation["key"])
        if version is None:
            raise Rejected(f"{operation['name']} has no version of {operation['key']}")
        self.client.set_registered_model_alias(operation["name"], operation["alias"], version.version)

    def _champion(self, operation: Operation, ids: dict[str, str]) -> None:
        """Set the alias to the champion at the time of applying, so that a late operation does not undo a newer one."""
        history = read_history(self.store, operation["run"])
        if not history:
            return
        champion, name = history[-1], registered_name(operation["run"])
        self.checkpoints.register(name, champion.student, champion.node.partition("@")[2])
        version = self.checkpoints.version(name, champion.student)
        assert version is not None
        self.client.set_registered_model_alias(name, CHAMPION_ALIAS, version.version)
        for fact in ("node", "by", "when", "reason"):
            value = str(getattr(champion, fact))[:TAG_LENGTH]
            self.client.set_model_version_tag(name, version.version, f"champion.{fact}", value)
        pages = {"champion": version_page("", name, version.version)}
        save_pages(self.store.home, operation["run"], pages)

    def _note(self, operation: Operation, ids: dict[str, str]) -> None:
        rows: list[tuple[Artifact, str]] = []
        charts: dict[str, str] = {}
        for key in operation["keys"]:
            artifact, model = self.store.find(key), self.checkpoints.model(key)
            if artifact and model:
                self.checkpoints.describe(artifact)
                rows.append((artifact, model_page(self.experiment, model)))
                charts |= {
                    f"{artifact.name}@{artifact.manifest.get('seed', 0)}: {domain}": page
                    for domain, page in self.checkpoints.curves(self.client.get_logged_model(model), artifact).items()
                }
        note = descriptions.run_note(rows, operation.get("page", ""), charts)
        self.client.set_tag(_run_id(operation["ref"], ids), NOTE, note_within(note))

    def _compared(self, operation: Operation, ids: dict[str, str]) -> None:
        run_id = _run_id(operation["ref"], ids)
        report = run_page("", self.experiment, run_id, "artifacts/report.html") if operation["report"] else ""
        about = {name: operation[name] for name in ("rows", "verdict", "title")}
        about |= {"run": run_page("", self.experiment, run_id), "report": report}
        self.checkpoints.compare(operation["key"], about)

    def _pages(self, operation: Operation, ids: dict[str, str]) -> None:
        """Save the URLs of the run's pages, for commands that do not connect to MLflow."""
        run_id = _run_id(operation["ref"], ids)
        pages = {
            "run": run_page("", self.experiment, run_id),
            "lineage": run_page("", self.experiment, run_id, "artifacts/lineage.html"),
        }
        save_pages(self.store.home, operation["run"], pages)

    def _close_killed(self, operation: Operation, ids: dict[str, str]) -> None:
        self._mark_killed(self.client)

    def _tag(self, operation: Operation, ids: dict[str, str]) -> None:
        self.client.set_tag(_run_id(operation["ref"], ids), operation["name"], operation["value"])

    def _end(self, operation: Operation, ids: dict[str, str]) -> None:
        self.client.set_terminated(_run_id(operation["ref"], ids), operation["status"], operation["time"])

    def _mark_killed(self, client: "MlflowClient") -> None:
        """Close this host's runs whose process was killed: no process holds the lock of their outbox any more.

        Runs of other hosts are left alone: their home may have the same path, but their locks are not visible here.
        """
        home, host = str(self.store.home.resolve()), os.uname().nodename
        running = f"attributes.status = 'RUNNING' and tags.home = '{home}' and tags.host = '{host}'"
        for run in client.search_runs([self.experiment], running):
            folder = unsent_folder(self.store.home, run.data.tags["name"])
            lock = FileLock(folder / f"{run.data.tags['token']}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            lock.release()
            if not Path(lock.lock_file).with_suffix(".jsonl").exists():
                client.set_terminated(run.info.run_id, "KILLED", int(time.time() * 1000))


def unsent_folder(home: Path, run: str) -> Path:
    """The folder of operations the tracking server has not accepted, with a file for each start of the run."""
    return home / "runs" / run / "unsent"


def _run_id(ref: str, ids: Mapping[str, str]) -> str:
    if ref not in ids:
        raise Rejected(f"the server refused its run, {ref}")
    return ids[ref]
