"""Checkpoints in MLflow: each is a LoggedModel of the run that made it, with its parents as that run's inputs.

A LoggedModel refers to the artifact's directory by URI and digest; weights are not copied. It is found by its content
key, so a checkpoint has one LoggedModel, however many runs use it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from flows.lineage import descriptions
from flows.servers.pages import chart_page, model_page
from flows.servers.start import mlflow_uri, without_secrets
from flows.tracking.curves import CURVE, ROLES, tracked
from flows.tracking.outbox import Rejected

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

NOTE = "mlflow.note.content"
# MLflow's limit for a tag. It would cut a longer one within a line and print a warning on the terminal.
LONGEST_NOTE = 8000
CUT_OFF = "\n\n… the rest is in the report, among the artifacts."
VERSIONS = "mlflow.modelVersions"
TABLES = "mlflow.loggedArtifacts"
STEP, COMPARED, MADE_INTO = "step", "compared", "made_into."
SHORT_ID = 8
REGISTERED = (
    "The students of one run file, a version each. `candidate` is the merge the gate judged last, `champion` the one "
    "that passed it or that a person promoted. Open a version: its description has scores beside those of teacher and "
    "start, data and cost, and links to what it was made from, down to the base, and to what was made of it."
)
SOURCE = {"mlflow.source.name": "mopd", "mlflow.source.type": "LOCAL"}


@contextmanager
def tracking_store(uri: str) -> Iterator[None]:
    """Make `uri` the store of MLflow's module functions inside the block; not all of them use the client's store.

    MLflow also writes the URI into the environment. It is restored, because it would direct the next run of this
    process, which may be in another home, to this store.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def note_within(text: str) -> str:
    """A page's description, cut at the end of a paragraph if it exceeds MLflow's limit."""
    if len(text) <= LONGEST_NOTE:
        return text
    return text[: LONGEST_NOTE - len(CUT_OFF)].rpartition("\n\n")[0] + CUT_OFF


class LoggedCheckpoints:
    """The LoggedModels of one experiment, by content key.

    Attributes:
        client: The connection.
        experiment: MLflow's id of the experiment.
        store: The artifacts.
    """

    def __init__(self, client: "MlflowClient", experiment: str, store: Store) -> None:
        self.client = client
        self.experiment = experiment
        self.store = store
        self._models: dict[str, str] = {}

    def model(self, key: str) -> str | None:
        """The LoggedModel of a checkpoint, created with its ancestors if this tracking store has none.

        Returns:
            Its id; None if neither the tracking store nor the artifact store has the key.
        """
        if key in self._models:
            return self._models[key]
        found = self.find(key)
        artifact = self.store.find(key)
        if found is None and artifact is not None:
            found = self._made_earlier(artifact)
        if found is not None:
            self._models[key] = found.model_id
        return self._models.get(key)

    def find(self, key: str) -> "LoggedModel | None":
        """The LoggedModel with this content key, if this tracking store has one."""
        found = self.client.search_logged_models([self.experiment], filter_string=f"tags.key = '{key}'")
        return next((model for model in found if model.status.name == "READY"), None)

    def _made_earlier(self, artifact: Artifact) -> "LoggedModel":
        """Record a checkpoint that was made without this tracking store, as a separate finished run with a model."""
        manifest = artifact.manifest
        end = int(manifest["created"] * 1000)
        tags = {"key": artifact.key, "stage": str(manifest.get("stage")), "seed": str(manifest.get("seed", 0))}
        name = f"{artifact.name}@{manifest.get('seed', 0)} (made earlier)"
        start = end - int(manifest.get("seconds", 0) * 1000)
        run_id = self.client.create_run(self.experiment, start, SOURCE | tags, name).info.run_id
        model = self.record(artifact, run_id, end, 0)
        self.client.set_terminated(run_id, "FINISHED", end)
        return model

    def record(self, artifact: Artifact, run_id: str, time_ms: int, step: int) -> "LoggedModel":
        """Log a checkpoint as the output of a run, its parents as inputs, and its final metrics on both.

        Args:
            artifact: The checkpoint.
            run_id: The run that made it.
            time_ms: Time of the metrics, in milliseconds since the epoch.
            step: The run's last step, so that the final metrics end its curves.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

        manifest = artifact.manifest
        parents = {role: self.model(parent["key"]) for role, parent in manifest.get("parents", {}).items()}
        # Another run may record the same checkpoint now: it waited for the node, or uses the result of this run.
        with self.store.lock("models"):
            model = self.find(artifact.key) or self._create(artifact, run_id, parents, step)
        inputs = [LoggedModelInput(parent) for parent in dict.fromkeys(parents.values()) if parent]
        if inputs:
            self.client.log_inputs(run_id, models=inputs)
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        metrics = [
            Metric(descriptions.metric_name(name), value, time_ms, step, model_id=model.model_id, run_id=run_id)
            for name, value in tracked(manifest.get("metrics", {})).items()
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        if (table := descriptions.data_table(artifact))["data"]:
            self.log_table(run_id, descriptions.DATA_FILE, table)
        self.client.set_tag(run_id, NOTE, str(model.tags.get(NOTE, "")))
        self._models[artifact.key] = model.model_id
        return model

    def log_table(self, run_id: str, file: str, table: Mapping[str, Any]) -> None:
        """Log a table as an artifact of a run, and list it in the tag from which MLflow's pages read tables."""
        self.client.log_text(run_id, json.dumps(table), file)
        listed = json.loads(self.client.get_run(run_id).data.tags.get(TABLES, "[]"))
        entry = {"path": file, "type": "table"}
        self.client.set_tag(run_id, TABLES, json.dumps([*(other for other in listed if other != entry), entry]))

    def describe(self, artifact: Artifact) -> None:
        """Update the description of a checkpoint's model, versions and run with its current scores."""
        model_id = self.model(artifact.key)
        if model_id is None:
            return
        model = self.client.get_logged_model(model_id)
        parents = {role: self.model(parent["key"]) for role, parent in artifact.manifest.get("parents", {}).items()}
        about = descriptions.About(
            pages=self._pages(parents),
            scores=_scores(model),
            children=self._children(model),
            curves=self.curves(model, artifact),
            **json.loads(model.tags.get(COMPARED, "{}")),
        )
        note = note_within(descriptions.model_note(artifact, about))
        if note == model.tags.get(NOTE):
            return
        self.client.set_logged_model_tags(model_id, {NOTE: note})
        for version in json.loads(model.tags.get(VERSIONS, "[]")):
            self.client.update_model_version(version["name"], version["version"], note)
        if maker := self.maker(model):
            self.client.set_tag(maker, NOTE, note)

    def _pages(self, parents: Mapping[str, str | None]) -> dict[str, str]:
        return {role: model_page(self.experiment, parent) for role, parent in parents.items() if parent}

    def _children(self, model: "LoggedModel") -> list[tuple[str, str]]:
        """Name and page of each checkpoint that was made from this one."""
        made = {tag.removeprefix(MADE_INTO): name for tag, name in model.tags.items() if tag.startswith(MADE_INTO)}
        often = Counter(made.values())
        return [
            (f"{name} ({child[:SHORT_ID]})" if often[name] > 1 else name, model_page(self.experiment, child))
            for child, name in sorted(made.items(), key=lambda item: item[1])
        ]

    def curves(self, model: "LoggedModel", artifact: Artifact) -> dict[str, str]:
        """domain -> chart of a student's score by step with those of teacher and start; empty without a monitor."""
        manifest, run_id = artifact.manifest, self.maker(model)
        if manifest.get("stage") != "distill" or not manifest.get("config", {}).get("monitor") or run_id is None:
            return {}
        wanted = {domain: [f"{CURVE}/{domain}/{role}" for role in ROLES] for domain in manifest.get("data", {})}
        return {
            domain: chart_page(self.experiment, run_id, [descriptions.metric_name(name) for name in names])
            for domain, names in wanted.items()
        }

    def compare(self, key: str, about: Mapping[str, Any]) -> None:
        """Save the comparison of a checkpoint with teacher and start, and the gate's verdict, for its description.

        Args:
            key: The checkpoint's content key.
            about: `rows`, `verdict`, `run`, `report` and `title`, as `flows.lineage.descriptions.About` has them.
        """
        if (model_id := self.model(key)) is not None:
            self.client.set_logged_model_tags(model_id, {COMPARED: json.dumps(about)})

    def _create(self, artifact: Artifact, run_id: str, parents: Mapping[str, str | None], step: int) -> "LoggedModel":
        import mlflow

        manifest = artifact.manifest
        tags = {"key": artifact.key, "digest": artifact.digest, "stage": str(manifest.get("stage"))}
        tags |= {f"parent.{role}": parent for role, parent in parents.items() if parent}
        note = descriptions.model_note(artifact, descriptions.About(pages=self._pages(parents)))
        tags |= {STEP: str(step), "seed": str(manifest.get("seed", 0)), NOTE: note}
        model = mlflow.create_external_model(
            name=descriptions.model_name(artifact),
            source_run_id=run_id,
            tags=tags,
            params=descriptions.model_params(artifact),
            model_type=str(manifest.get("stage", "checkpoint")),
            experiment_id=self.experiment,
        )
        child = {f"{MADE_INTO}{model.model_id}": f"{artifact.name}@{manifest.get('seed', 0)}"}
        for parent in dict.fromkeys(parents.values()):
            if parent:
                self.client.set_logged_model_tags(parent, child)
        return model

    def maker(self, model: "LoggedModel") -> str | None:
        """The id of the run that made a checkpoint, unless the run has been deleted."""
        if not model.source_run_id:
            return None
        info = self.client.get_run(model.source_run_id).info
        return str(info.run_id) if info.lifecycle_stage == "active" else None

    def register(self, name: str, key: str, seed: str) -> None:
        """Make a checkpoint a version of a registered model, once.

        Raises:
            Rejected: the checkpoint is neither in the tracking store nor in the artifact store.
        """
        from mlflow.exceptions import MlflowException

        model_id = self.model(key)
        if model_id is None:
            raise Rejected(f"checkpoint {key} is no longer in the store")
        try:
            self.client.create_registered_model(name, description=REGISTERED)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if self.version(name, key) is None:
            model = self.client.get_logged_model(model_id)
            version = self.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=self.maker(model),
                tags={"key": key, "seed": seed},
                description=str(model.tags.get(NOTE, "")),
                model_id=model_id,
            )
            versions = json.loads(model.tags.get(VERSIONS, "[]"))
            versions.append({"name": name, "version": str(version.version)})
            self.client.set_logged_model_tags(model_id, {VERSIONS: json.dumps(versions)})

    def version(self, name: str, key: str) -> "ModelVersion | None":
        """The version of a registered model that is the checkpoint with this content key."""
        versions = self.client.search_model_versions(f"name = '{name}'")
        return next((version for version in versions if version.tags.get("key") == key), None)


def registered_keys(store: Store) -> set[str]:
    """The content keys of all versions of all registered models; empty if nothing was ever tracked.

    Raises:
        UserError: the tracking store cannot be read.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = mlflow_uri(store.home)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return set()
    keys: set[str] = set()
    try:
        with tracking_store(uri):
            client, token = MlflowClient(uri), None
            while True:
                page = client.search_model_versions(page_token=token)
                keys |= {version.tags["key"] for version in page if "key" in version.tags}
                token = page.token
                if not token:
                    return keys
    except (MlflowException, OSError) as error:
        raise UserError(
            f"MLflow's registry cannot be read, so what it refers to is unknown: {without_secrets(str(error))}"
        ) from error


def _scores(model: "LoggedModel") -> dict[tuple[str, str], float]:
    """(domain, split) -> the latest greedy score of a checkpoint in MLflow."""
    latest: dict[tuple[str, str], float] = {}
    for metric in sorted(model.metrics or (), key=lambda metric: metric.timestamp):
        kind, _, name = metric.key.partition("/")
        place, _, measure = name.rpartition("/")
        if kind == "eval" and measure == "greedy":
            domain, _, split = place.rpartition("/")
            latest[domain, split] = metric.value
    return dict(sorted(latest.items()))
