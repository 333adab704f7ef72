"""Says a tracker's operations to MLflow. The one module of the tracking that imports mlflow.

An operation names runs by reference and checkpoints by content key; both are looked up here when it is said, which may
be long after it was submitted. Saying an operation twice does no harm: checkpoints are found by their key, scores
and versions by a tag.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from flows import cards
from flows.outbox import Operation, Rejected, Unreachable
from flows.servers import mlflow_artifacts, mlflow_environment, mlflow_model_page, mlflow_uri
from stages.core.checkpoint import Artifact, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "mopd"
NOTE = "mlflow.note.content"
KIND = "mlflow.experimentKind"
VERSIONS = "mlflow.modelVersions"
SOURCE = {"mlflow.source.name": "mopd", "mlflow.source.type": "LOCAL"}
TABLES = "mlflow.loggedArtifacts"
HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


class Writer:
    """Applies operations; connects at the first one, for a server may be away when a run starts.

    Attributes:
        uri: The tracking store.
        experiment: MLflow's id of the one experiment all runs are in; empty before the first connection.
    """

    def __init__(self, store: Store) -> None:
        os.environ.update(mlflow_environment())
        self.store = store
        self.uri = mlflow_uri(store.home)
        self.experiment = ""
        self._client: MlflowClient | None = None
        self._models: dict[str, str] = {}
        self._say: dict[str, Callable[[Operation, dict[str, str]], None]] = {
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
            "note": self._note,
            "end": self._end,
        }

    def __call__(self, operation: Operation, ids: dict[str, str]) -> None:
        """Say one operation.

        Args:
            operation: `op` and its fields.
            ids: reference -> MLflow's run id; a new run's is added.

        Raises:
            Unreachable: the server may take it later.
            Rejected: the server will never take it.
        """
        import requests
        from mlflow.exceptions import MlflowException

        try:
            self._say[operation["op"]](operation, ids)
        except MlflowException as error:
            kind = Rejected if error.error_code in HOPELESS else Unreachable
            raise kind(str(error)) from error
        except requests.RequestException as error:
            raise Unreachable(str(error)) from error

    @property
    def client(self) -> "MlflowClient":
        """The connection. The first one migrates a fresh database, alone: several at once break each other."""
        if self._client is None:
            import mlflow

            with self.store.lock("mlflow"):
                mlflow.set_tracking_uri(self.uri)
                client = mlflow.MlflowClient(self.uri)
                known = client.get_experiment_by_name(EXPERIMENT)
                local = mlflow_artifacts(self.store.home).as_uri() if self.uri.startswith("sqlite") else None
                tags = {KIND: "custom_model_development"}
                self.experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, local, tags)
            self._client = client
            self._mark_killed()
        return self._client

    def model(self, key: str) -> str | None:
        """The LoggedModel of a checkpoint, created with its ancestors where this tracking store has none.

        Returns:
            Its id; None when neither the tracking store nor the artifact store knows the key.
        """
        if key in self._models:
            return self._models[key]
        found = self._find_model(key)
        artifact = self.store.find(key)
        if found is None and artifact is not None:
            found = self._made_earlier(artifact)
        if found is not None:
            self._models[key] = found.model_id
        return self._models.get(key)

    def _find_model(self, key: str) -> "LoggedModel | None":
        found = self.client.search_logged_models([self.experiment], filter_string=f"tags.key = '{key}'")
        return next((model for model in found if model.status.name == "READY"), None)

    def _made_earlier(self, artifact: Artifact) -> "LoggedModel":
        """Record a checkpoint this tracking store never saw being made: a finished run of its own, and its model."""
        manifest = artifact.manifest
        end = int(manifest["created"] * 1000)
        tags = {"key": artifact.key, "stage": str(manifest.get("stage")), "seed": str(manifest.get("seed", 0))}
        name = f"{artifact.name}@{manifest.get('seed', 0)} (made earlier)"
        start = end - int(manifest.get("seconds", 0) * 1000)
        run_id = self.client.create_run(self.experiment, start, SOURCE | tags, name).info.run_id
        model = self._record(artifact, run_id, end)
        self.client.set_terminated(run_id, "FINISHED", end)
        return model

    def _record(self, artifact: Artifact, run_id: str, time_ms: int) -> "LoggedModel":
        """Make a checkpoint the output of a run, its parents the inputs, its final metrics those of both."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

        manifest = artifact.manifest
        parents = {role: self.model(parent["key"]) for role, parent in manifest.get("parents", {}).items()}
        model = self._find_model(artifact.key) or self._create_model(artifact, run_id, parents)
        inputs = [LoggedModelInput(parent) for parent in dict.fromkeys(parents.values()) if parent]
        if inputs:
            self.client.log_inputs(run_id, models=inputs)
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        metrics = [
            Metric(cards.metric_name(name), value, time_ms, 0, model_id=model.model_id, run_id=run_id)
            for name, value in manifest.get("metrics", {}).items()
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        self.client.set_tag(run_id, NOTE, str(model.tags.get(NOTE, "")))
        return model

    def _create_model(self, artifact: Artifact, run_id: str, parents: Mapping[str, str | None]) -> "LoggedModel":
        import mlflow

        manifest = artifact.manifest
        pages = {role: mlflow_model_page("", self.experiment, parent) for role, parent in parents.items() if parent}
        tags = {"key": artifact.key, "digest": artifact.digest, "stage": str(manifest.get("stage"))}
        tags |= {f"parent.{role}": parent for role, parent in parents.items() if parent}
        return mlflow.create_external_model(
            name=cards.model_name(artifact),
            source_run_id=run_id,
            tags={**tags, "seed": str(manifest.get("seed", 0)), NOTE: cards.model_note(artifact, pages)},
            params=cards.model_params(artifact),
            model_type=str(manifest.get("stage", "checkpoint")),
            experiment_id=self.experiment,
        )

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
        run_id, file = _run_id(operation["ref"], ids), operation["file"]
        self.client.log_text(run_id, json.dumps(operation["table"]), file)
        self.client.set_tag(run_id, TABLES, json.dumps([{"path": file, "type": "table"}]))

    def _made(self, operation: Operation, ids: dict[str, str]) -> None:
        artifact = self.store.find(operation["key"])
        if artifact is None:
            raise Rejected(f"checkpoint {operation['key']} is no longer in the store")
        model = self._record(artifact, _run_id(operation["ref"], ids), operation["time"])
        self._models[artifact.key] = model.model_id

    def _used(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import LoggedModelInput

        if model := self.model(operation["key"]):
            self.client.log_inputs(_run_id(operation["ref"], ids), models=[LoggedModelInput(model)])

    def _scores(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        model_id, data = self.model(operation["key"]), operation["data"]
        if model_id is None:
            raise Rejected(f"checkpoint {operation['key']} is no longer in the store")
        tag = f"scores.{data['name']}"
        model = self.client.get_logged_model(model_id)
        if model.tags.get(tag) == operation["scores"]:
            return
        run_id = self._maker(model) or _run_id(operation["ref"], ids)
        self._log_datasets(run_id, [data])
        about = {"model_id": model_id, "dataset_name": data["name"], "dataset_digest": data["digest"]}
        metrics = [
            Metric(name, value, operation["time"], 0, run_id=run_id, **about)
            for name, value in operation["metrics"].items()
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        self.client.set_logged_model_tags(model_id, {tag: operation["scores"]})

    def _maker(self, model: "LoggedModel") -> str | None:
        """The run that made a checkpoint, if it was not deleted since."""
        if not model.source_run_id:
            return None
        info = self.client.get_run(model.source_run_id).info
        return str(info.run_id) if info.lifecycle_stage == "active" else None

    def _model_text(self, operation: Operation, ids: dict[str, str]) -> None:
        if model := self.model(operation["key"]):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / operation["file"]
                path.write_text(operation["text"])
                self.client.log_model_artifact(model, str(path))

    def _version(self, operation: Operation, ids: dict[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        name, key = operation["name"], operation["key"]
        model_id = self.model(key)
        if model_id is None:
            raise Rejected(f"checkpoint {key} is no longer in the store")
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if self._find_version(name, key) is None:
            model = self.client.get_logged_model(model_id)
            version = self.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=self._maker(model),
                tags={"key": key, "seed": operation["seed"]},
                description=str(model.tags.get(NOTE, "")),
                model_id=model_id,
            )
            versions = json.loads(model.tags.get(VERSIONS, "[]"))
            versions.append({"name": name, "version": str(version.version)})
            self.client.set_logged_model_tags(model_id, {VERSIONS: json.dumps(versions)})

    def _find_version(self, name: str, key: str) -> "ModelVersion | None":
        versions = self.client.search_model_versions(f"name = '{name}'")
        return next((version for version in versions if version.tags.get("key") == key), None)

    def _alias(self, operation: Operation, ids: dict[str, str]) -> None:
        version = self._find_version(operation["name"], operation["key"])
        if version is None:
            raise Rejected(f"{operation['name']} has no version of {operation['key']}")
        self.client.set_registered_model_alias(operation["name"], operation["alias"], version.version)

    def _note(self, operation: Operation, ids: dict[str, str]) -> None:
        rows = []
        for key in operation["keys"]:
            artifact, model = self.store.find(key), self.model(key)
            if artifact and model:
                rows.append((artifact, mlflow_model_page("", self.experiment, model)))
        self.client.set_tag(_run_id(operation["ref"], ids), NOTE, cards.run_note(rows))

    def _end(self, operation: Operation, ids: dict[str, str]) -> None:
        self.client.set_terminated(_run_id(operation["ref"], ids), operation["status"], operation["time"])

    def _mark_killed(self) -> None:
        """Close the runs whose process died without a word: their outbox is nobody's any more."""
        assert self._client
        home = str(self.store.home.resolve())
        running = f"attributes.status = 'RUNNING' and tags.home = '{home}'"
        for run in self._client.search_runs([self.experiment], running):
            folder = unsent_folder(self.store.home, run.data.tags["name"])
            lock = FileLock(folder / f"{run.data.tags['token']}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            lock.release()
            if not Path(lock.lock_file).with_suffix(".jsonl").exists():
                self._client.set_terminated(run.info.run_id, "KILLED", int(time.time() * 1000))


def unsent_folder(home: Path, run: str) -> Path:
    """Where what the tracking server has not taken is kept, a file for each start of the run."""
    return home / "runs" / run / "unsent"


def _run_id(ref: str, ids: Mapping[str, str]) -> str:
    if ref not in ids:
        raise Rejected(f"the server refused its run, {ref}")
    return ids[ref]
