"""Exports a checkpoint as a Hugging Face directory with a model card that shows its lineage."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError, is_unreachable
from base.store.checkpoint import Artifact, Store
from evals.report.table import percent
from evals.tables.grid import ABSENT
from evals.tables.markdown import plain
from evals.tables.templates import text
from experts.domain import HELD_OUT
from flows.lineage import descriptions
from flows.lineage.card_facts import NO_FACTS, CardFacts, base_of, example_prompt, facts_of
from flows.lineage.mermaid import mermaid
from flows.lineage.rows import SHORT, Row, resolve_one, rows
from flows.run_file.schema import BASE, COLD_START
from stages.config.kinds import EVALUATIONS
from stages.config.roles import is_teacher

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD, LINEAGE = "README.md", "lineage.json"
TAGS = ("mopd", "on-policy-distillation")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def export(
    store: Store,
    reference: str,
    folder: Path,
    *,
    dtype: str = "auto",
    push: str | None = None,
    public: bool = False,
    remote_code: bool = False,
) -> list[str]:
    """Write a checkpoint as a directory that transformers and vLLM load directly.

    Args:
        store: The artifact store.
        reference: As for `flows.lineage.rows.resolve_one`.
        folder: The target; must not exist, or be empty. It appears complete or not at all.
        dtype: Type of the weights; see `stages.export`.
        push: A Hub repository, `OWNER/NAME`, to upload the directory to; created if it is missing.
        public: Whether a newly created repository is public.
        remote_code: Whether the checkpoint's own Python code may run.

    Returns:
        The actions done, one line each.

    Raises:
        UserError: there is no such checkpoint, the folder is in use, or the Hub refuses the upload; the written
            directory is kept.
    """
    artifact = resolve_one(store, reference)
    store.verify(artifact)
    if artifact.manifest.get("stage") in EVALUATIONS:
        raise UserError(f"{reference}: {artifact.name} is a measurement, not a checkpoint")
    if push is not None and not REPOSITORY.fullmatch(push):
        raise UserError(f"--push: '{push}': name a repository of the Hub as OWNER/NAME")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: this directory exists and is not empty; name a new one")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    temporary.mkdir(parents=True)
    try:
        from stages.export import export_weights

        parameters = export_weights(artifact, store, temporary, dtype, remote_code)
        found = rows(store, [artifact.key])
        (temporary / LINEAGE).write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        card = model_card(artifact, found, _title(artifact, reference), facts_of(store, artifact, found))
        (temporary / CARD).write_text(card, encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines = [f"{folder}: {artifact.name} (key {artifact.key}), {parameters:,} parameters, read back with equal logits"]
    if push is not None:
        lines.append(f"pushed to {_push(folder, push, public)}")
    return lines


def _title(artifact: Artifact, reference: str) -> str:
    """A name for the model: the reference, or the checkpoint's name and digest if that is a content key."""
    if ":" in reference or not artifact.key.startswith(reference):
        return reference.replace(":", "-").replace("/", "-").replace("@", "-")
    return f"{artifact.name.replace('/', '-')}-{artifact.digest[:SHORT]}"


def model_card(artifact: Artifact, lineage: Sequence[Row], name: str, facts: CardFacts = NO_FACTS) -> str:
    """The model card: how to load it, its scores and its ancestors', the gate's verdict, lineage and cost.

    Args:
        artifact: The checkpoint.
        lineage: The checkpoint and its ancestors, parents first.
        name: Title.
        facts: Facts from the store and its runs, besides the lineage.
    """
    from huggingface_hub import ModelCardData

    own = next(row for row in lineage if row.key == artifact.key)
    origins = [str(each) for row in lineage if row.name == BASE and (each := _origin(row))]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model=origins[0] if origins else None,
        model_name=name,
        eval_results=_results(own) or None,
    )
    teachers = {parent for role, parent in own.parents.items() if is_teacher(role)}
    shown, answer = example_prompt(artifact) or ("…", "")
    return (
        text(
            "flows.lineage",
            "model_card.md",
            metadata=data.to_yaml(),
            title=name,
            own=own,
            base=base_of(lineage),
            lineage=lineage,
            lineage_file=LINEAGE,
            short=SHORT,
            chat=any("chat_template" in file for file in artifact.manifest.get("files", {})),
            prompt=_literal(shown),
            answer=_literal(answer) if answer else "",
            facts=facts,
            columns=[
                row for row in lineage if row.name in (BASE, COLD_START) or row.key in teachers or row.key == own.key
            ],
            called=_called,
            score=lambda row, place: _score(row, place, facts),
            lesson=descriptions.lesson,
            drawing=mermaid(lineage),
            names={row.key: _called(row, lineage) for row in lineage},
        )
        + "\n"
    )


def _literal(value: str) -> str:
    """A text as a Python literal; a backtick would end the code block."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")


def _score(row: Row, place: str, facts: CardFacts) -> str:
    if (found := facts.intervals.get((row.key, place))) is not None:
        return percent(found)
    return f"{100 * row.scores[place]:.1f}" if place in row.scores else ABSENT


def _results(own: Row) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=domain,
            dataset_name=domain,
            dataset_split=split,
            metric_type="accuracy",
            metric_name="greedy accuracy",
            metric_value=round(score, 4),
        )
        for place, score in sorted(own.scores.items())
        for domain, _, split in [place.rpartition("/")]
        if split == HELD_OUT
    ]


def _origin(row: Row) -> str | None:
    """The Hub id a base was loaded from."""
    source: Mapping[str, Any] = row.config
    return source.get("location") if row.stage == "load" and source.get("kind") == "hub" else None


def _called(row: Row, others: Sequence[Row]) -> str:
    """Its name, with its key if another checkpoint has the same name."""
    name = plain(row.name)
    return name if sum(row.name == other.name for other in others) == 1 else f"{name} `{row.key[:SHORT]}`"


def _push(folder: Path, repository: str, public: bool) -> str:
    """Upload a directory to the Hub; the token is huggingface_hub's own (`HF_TOKEN`, or `hf auth login`)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"mopd export {folder.name}")
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError)) and not is_unreachable(error):
            raise
        raise UserError(
            f"--push {repository}: {error}; {folder} is written: `hf upload {repository} {folder} .` sends it later"
        ) from error
    return str(address)
