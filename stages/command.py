"""Command stage: a program of the user's own trains an expert or merges teachers, with whatever it uses inside.

The program is a process of this one. It finds its inputs by the names in its arguments, or as environment variables:
the start and the teachers as Hugging Face folders with merged adapters, and the training examples of each domain as
JSON lines. It writes a Hugging Face folder, or a PEFT adapter of the start, which becomes the node's artifact. Its
lines of progress become the node's curve. `{work}` is a folder of its own that remains after a failure, so that the
program can continue from what it saved there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from base import processes
from base.errors import InfrastructureError, UserError, first_line
from base.store.checkpoint import Artifact
from experts.domain import Example
from stages.config.command import CommandConfig, MergeCommandConfig
from stages.config.roles import teacher_role
from stages.export import cast_parameters, export_weights, with_adapter
from stages.learner.program_output import Line, parser
from stages.learner.stage import SHOWN, draw_training, left_out, shown
from stages.learner.workspace import Workspace
from stages.load import LIBRARIES_FAULTS, make_writable, read_checkpoint
from stages.model.policy import save_tokenizer
from stages.model.tokenizers import tokenizer_difference
from stages.rows.trained_on import TrainedOn

FOLDER, ADAPTER = "program", "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Last lines of the output that a message shows.
LAST_LINES = 3
TEMPORARY_FAILURE = 75


def run(config: CommandConfig, workspace: Workspace) -> Artifact:
    """Run the program and commit the checkpoint that it writes.

    Args:
        config: The program; a `MergeCommandConfig` for a merge.
        workspace: The parents `start` and `teacher/…`, the domains and the seed.

    Returns:
        The committed expert or student.

    Raises:
        UserError: the program does not exist, its files changed since the plan, it failed, or it wrote no checkpoint
            that reads text as the start does.
        InfrastructureError: it was killed by a signal, or ended with exit code 75; it is started again.
    """
    _check_files(config, workspace)
    root = workspace.folder / FOLDER
    drawn = draw_training(workspace, config)
    places = _prepare(config, workspace, drawn, root)
    journal = workspace.journal()
    for note in left_out(workspace):
        journal.note(0, note)
    metrics: dict[str, float] = {}
    stage = str(workspace.provenance["stage"])

    def take(line: Line) -> None:
        if line.metrics:
            metrics.update(line.metrics)
            journal.metrics(line.step, {f"{stage}/{name}": value for name, value in line.metrics.items()})
        journal.progress(line.step, max(line.step, line.total or config.max_steps))

    _execute(config, workspace, places, root, take)
    model, tokenizer = _result(workspace, root)
    folder = workspace.store.staging(workspace.key)
    make_writable(model)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    artifact = workspace.commit(
        folder,
        trained_on=TrainedOn.of(workspace.domains, drawn),
        metrics=metrics,
        adapter_base=None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        examples={domain: [shown(example) for example in found[:SHOWN]] for domain, found in drawn.items()},
    )
    shutil.rmtree(root, ignore_errors=True)
    return artifact


def _check_files(config: CommandConfig, workspace: Workspace) -> None:
    """Refuse to run files that are not those in the content key."""
    planned = workspace.provenance.get("ingredients", {}).get("files", {})
    try:
        found = config.contents()
    except OSError as error:
        raise UserError(f"{workspace.name}: {error}") from error
    if changed := sorted(name for name in found if found[name] != planned.get(name)):
        raise UserError(f"{workspace.name}: {changed[0]} has changed since the run was planned; run it again")


def _prepare(
    config: CommandConfig, workspace: Workspace, drawn: Mapping[str, Sequence[Example]], root: Path
) -> dict[str, str]:
    """Write the program's inputs and return the values of the names in its arguments."""
    for name in ("start", "teachers", "data", "out"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    (root / "work").mkdir(exist_ok=True)
    export_weights(workspace.parents["start"], workspace.store, root / "start", remote_code=workspace.remote_code)
    tokenizer = AutoTokenizer.from_pretrained(root / "start", trust_remote_code=workspace.remote_code)
    for domain, examples in drawn.items():
        with (root / "data" / f"{domain}.jsonl").open("w", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(_row(example, tokenizer.chat_template is not None), ensure_ascii=False) + "\n")
    places = {name: str(root / name) for name in ("start", "data", "out", "work")}
    if isinstance(config, MergeCommandConfig):
        table = _teachers(config, workspace, root / "teachers")
        (root / "teachers.json").write_text(json.dumps(table, indent=1))
    places["teachers"] = str(root / "teachers.json")
    return places | {"python": sys.executable, "seed": str(workspace.seed), "max_steps": str(config.max_steps)}


def _row(example: Example, chat: bool) -> dict[str, Any]:
    """An example as TRL and others read it: prompt and completion, as messages where there is a chat template."""
    prompt: Any = example.prompt
    completion: Any = example.answer
    if chat:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        completion = [{"role": "assistant", "content": example.answer}]
    return {"prompt": prompt, "completion": completion, "domain": example.domain, "example": asdict(example)}


def _teachers(config: MergeCommandConfig, workspace: Workspace, root: Path) -> dict[str, list[dict[str, Any]]]:
    """domain -> its teachers, each `{"path", "weight"}`; every checkpoint is written once."""
    paths: dict[str, str] = {}
    table: dict[str, list[dict[str, Any]]] = {}
    for domain in workspace.domains:
        several = config.teacher_weights.get(domain)
        roles = {teacher_role(domain, name): weight for name, weight in (several or {}).items()}
        for role, weight in (roles or {teacher_role(domain): 1.0}).items():
            teacher = workspace.parents[role]
            if teacher.key not in paths:
                folder = root / teacher.key
                folder.mkdir()
                export_weights(teacher, workspace.store, folder, remote_code=workspace.remote_code)
                paths[teacher.key] = str(folder)
            table.setdefault(domain, []).append({"path": paths[teacher.key], "weight": weight})
    return table


def _execute(config: CommandConfig, workspace: Workspace, places: Mapping[str, str], root: Path, take: Any) -> None:
    """Run the program to its end; its output goes to the node's log, its lines of progress to `take`."""
    arguments = [word.format(**places) for word in config.run]
    if shutil.which(arguments[0]) is None:
        raise UserError(f"{workspace.name}: {arguments[0]}: no such program")
    last: deque[str] = deque(maxlen=LAST_LINES)
    parse = parser(config.progress)
    process = subprocess.Popen(
        [sys.executable, processes.__file__, str(os.getpid()), *arguments],
        cwd=root / "work",
        env=_environment(places),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with process:
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            if text.strip():
                last.append(text.strip()[:500])
            if (line := parse(text)) is not None:
                take(line)
    program = " ".join(arguments[:2])
    shown_lines = "; ".join(last) or "no output"
    if process.returncode < 0:
        raise InfrastructureError(f"{workspace.name}: {program} was killed by signal {-process.returncode}")
    if process.returncode == TEMPORARY_FAILURE:
        raise InfrastructureError(f"{workspace.name}: {program} ended with {TEMPORARY_FAILURE}: {shown_lines}")
    if process.returncode:
        raise UserError(f"{workspace.name}: {program} ended with {process.returncode}: {shown_lines}")


def _environment(places: Mapping[str, str]) -> dict[str, str]:
    """The program's environment: that of this process, with the places and the number of threads."""
    # A user's script imports the modules beside it.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    named = {f"MOPD_{name.upper()}": value for name, value in places.items()}
    return own | named | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def _result(workspace: Workspace, root: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint that the program wrote, or the start with the adapter that it wrote."""
    out, start = root / "out", root / "start"
    if not any(out.iterdir()):
        raise UserError(f"{workspace.name}: the program ended without writing to {{out}}, {out}")
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=workspace.remote_code)
    if not any((out / name).exists() for name in TOKENIZER_FILES):
        save_tokenizer(tokenizer, out)
    if (out / ADAPTER).exists():
        model = _with_adapter(workspace, start, out)
        theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=workspace.remote_code)
    else:
        model, theirs = read_checkpoint(workspace.name, out, workspace.remote_code)
    if difference := tokenizer_difference(tokenizer, theirs):
        raise UserError(f"{workspace.name}: the program changed the tokenizer: {difference}")
    return model, tokenizer


def _with_adapter(workspace: Workspace, start: Path, out: Path) -> PreTrainedModel:
    try:
        base = AutoModelForCausalLM.from_pretrained(start, dtype="auto", trust_remote_code=workspace.remote_code)
        kept, model = base.dtype, with_adapter(base, str(out))
    except LIBRARIES_FAULTS as error:
        raise UserError(f"{workspace.name}: {out}: no adapter of the start: {first_line(error)}") from error
    cast_parameters(model, kept)
    return model
