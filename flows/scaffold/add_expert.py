"""Adds an expert to a run file or removes it; the file's comments and layout are kept. Torch-free.

Lists of domains are pinned first, so that nothing is retrained because of a longer list: a pretrained base and a cold
start keep the domains they were made from.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.documents import parse_value
from base.errors import UserError, nearest
from experts.data.sources import typed_options
from experts.domain import OWN_SUFFIX, TRAIN
from experts.loading import KINDS, load_domain
from flows.run_file.load import load_run_file, replaced
from flows.run_file.schema import RunConfig
from flows.scaffold.yaml_edits import _flow, _inline, _read, _section, _yaml
from stages.config.kinds import EXPERT_METHODS

TEST_OF_SCAFFOLD = '''"""Distinct prompts, splits apart, and a score of 1 for the gold answer alone."""

from pathlib import Path

from experts.loading import load_domain

DOMAIN = load_domain("{name}", str(Path(__file__).with_name("{file}")), {{}})


def test_examples_are_distinct_and_splits_apart():
    train, held_out = DOMAIN.draw("train", 50, 0), DOMAIN.draw("held_out", 50, 0)
    assert len({{example.prompt for example in train}}) == 50
    assert not {{example.source for example in train}} & {{example.source for example in held_out}}
    assert train == DOMAIN.draw("train", 50, 0)


def test_the_gold_answer_scores_and_nothing_else():
    for example in DOMAIN.draw("train", 20, 1):
        assert DOMAIN.score(example, example.answer) == 1.0
        assert DOMAIN.score(example, "") == DOMAIN.score(example, example.answer + " or so") == 0.0
'''


@dataclass(frozen=True)
class NewExpert:
    """A request for a new expert.

    Attributes:
        name: The expert's name; also the new domain's, if `domain` is a kind.
        domain: A domain of the run file, or the kind of a new one.
        tasks: Tasks of a `strings` or `reasoning` domain.
        options: Options of the new domain, `KEY=VALUE` with YAML values.
        method: How it is trained; None to train it as `like`, or as the first expert.
        like: Expert of the run file whose settings are copied.
        settings: Training settings that differ, `KEY=VALUE`.
        checkpoint: An expert trained elsewhere, instead of training.
        module: File of a user's own domain, instead of a kind; written from the scaffold if it does not exist.
    """

    name: str
    domain: str | None = None
    tasks: Sequence[str] = ()
    options: Sequence[str] = ()
    method: str | None = None
    like: str | None = None
    settings: Sequence[str] = ()
    checkpoint: str | None = None
    module: Path | None = None


def add_expert(path: Path, asked: NewExpert, home: Path) -> list[str]:
    """Write an expert, and its domain if it is new, into a run file.

    Args:
        path: The run file; replaced as a whole, and only by one that loads and plans.
        asked: The expert.
        home: `$MOPD_HOME`, to plan with.

    Returns:
        The changes made, and the nodes to run.

    Raises:
        UserError: the expert exists already, or something it names does not; the file is unchanged.
    """
    config = load_run_file(path)
    if asked.name in config.experts:
        raise UserError(f"{path}: experts.{asked.name} exists already; `mopd remove-expert` removes it")
    document = _read(path)
    changes: list[str] = []
    if asked.module is not None:
        changes += _scaffold(path, asked)
    domain, entry = _domain(path, config, asked)
    if entry is not None:
        changes += _pin_lists(document, config)
        _section(document, "domains")[domain] = entry
        changes.append(f"domains.{domain}: {_flow(entry)}")
    expert = {"domain": domain} | ({"checkpoint": asked.checkpoint} if asked.checkpoint else _training(config, asked))
    _section(document, "experts")[asked.name] = expert
    changes.append(f"experts.{asked.name}: {_flow(expert)}")
    changes += _route(document, config, asked.name, domain, entry is not None)
    return [*changes, *_replace(path, document, home, drawn=domain)]


def remove_expert(path: Path, name: str, home: Path, *, with_domain: bool) -> list[str]:
    """Remove an expert from a run file; its checkpoint and lineage stay in the store.

    Args:
        path: The run file; replaced as a whole, and only by one that loads and plans.
        name: The expert.
        home: `$MOPD_HOME`, to plan with.
        with_domain: Also remove its domain, if nothing else names it; otherwise it is still measured.

    Raises:
        UserError: there is no such expert, or something else still needs it; the file is unchanged.
    """
    config = load_run_file(path)
    if name not in config.experts:
        raise UserError(f"{path}: there is no experts.{name}{nearest(name, config.experts)}")
    document = _read(path)
    if name not in (document.get("experts") or {}):
        raise UserError(f"{path}: experts.{name} is in {document.get('extends')}, which this file extends")
    domain = config.experts[name].domain
    del document["experts"][name]
    changes = [f"experts.{name}: removed; its checkpoint stays in the store, {_where(config, name, home)}"]
    changes += _unroute(document, name, domain, any(e.domain == domain for n, e in config.experts.items() if n != name))
    if with_domain:
        if domain not in (document.get("domains") or {}):
            raise UserError(f"{path}: domains.{domain} is in {document.get('extends')}, which this file extends")
        del document["domains"][domain]
        changes.append(f"domains.{domain}: removed")
    elif domain in (document.get("domains") or {}):
        changes.append(f"domains.{domain}: kept and still measured; --with-domain removes it too")
    return [*changes, *_replace(path, document, home)]


def _where(config: RunConfig, name: str, home: Path) -> str:
    """The commands that show a former expert's lineage, one for each seed."""
    from flows.plan.graph import build_graph

    graph = build_graph(config, home)
    keys = [node.key for node in graph.checkpoints if node.name == f"experts/{name}"]
    return "and its lineage is shown by " + ", ".join(f"`mopd lineage {key}`" for key in keys)


def _domain(path: Path, config: RunConfig, asked: NewExpert) -> tuple[str, dict[str, Any] | None]:
    """The domain's name, and its entry if it is new."""
    kind = asked.domain
    if asked.module is not None:
        kind = os.path.relpath(asked.module.resolve(), path.parent.resolve())
    if kind is None:
        raise UserError("--domain: name a domain of the run file, or the kind of a new one")
    if kind in config.domains:
        if asked.tasks or asked.options:
            raise UserError(f"--task and --option are for a new domain; '{kind}' is already in {path}")
        return kind, None
    if kind not in KINDS and not kind.endswith(OWN_SUFFIX):
        hint = nearest(kind, [*config.domains, *KINDS])
        raise UserError(f"--domain: '{kind}' is neither a domain of {path} nor a kind of domain{hint}")
    if asked.name in config.domains:
        raise UserError(f"{path}: domains.{asked.name} exists already; --domain {asked.name} trains an expert in it")
    options: dict[str, Any] = {}
    if asked.tasks:
        options = _tasks(kind, asked.tasks)
    for assignment in asked.options:
        _assign(options, assignment, "--option")
    options = typed_options(options, path.parent)
    return asked.name, {"kind": kind} | ({"options": options} if options else {})


def _tasks(kind: str, tasks: Sequence[str]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"tasks": {task: {} for task in tasks}}
    if kind != "strings":
        raise UserError(f"--task is for the kinds strings and reasoning; {kind} takes --option")
    if len(tasks) > 1:
        raise UserError(f"--task: a strings domain has exactly one task, not {len(tasks)}")
    return {"task": tasks[0]}


def _training(config: RunConfig, asked: NewExpert) -> dict[str, Any]:
    """The new expert's `train`, copied from another expert."""
    trained = {name: expert.train for name, expert in config.experts.items() if expert.train}
    if asked.like is not None and asked.like not in trained:
        raise UserError(f"--like: no expert '{asked.like}' is trained in this run{nearest(asked.like, trained)}")
    if asked.method is not None and asked.method not in EXPERT_METHODS:
        raise UserError(
            f"--train: '{asked.method}' is not one of {', '.join(EXPERT_METHODS)}"
            f"{nearest(asked.method, EXPERT_METHODS)}"
        )
    candidates = [asked.like] if asked.like else list(trained)
    model = next((n for n in candidates if asked.method in (None, trained[n].chosen[0])), None)
    if model is None:
        settings: dict[str, Any] = {}
        method = asked.method or "rl"
    else:
        method, own = trained[model].chosen
        settings = own.model_dump(mode="json", exclude_unset=True)
    for assignment in asked.settings:
        _assign(settings, assignment, "--set")
    return {"train": {method: settings}}


def _pin_lists(document: Any, config: RunConfig) -> list[str]:
    """Replace `all` by the names it stood for in base and cold start, so that neither is made again."""
    changes = []
    if config.base.pretrain and config.base.pretrain.domains == "all":
        _section(document, "base", "pretrain")["domains"] = _inline(list(config.domains))
        changes.append("base.pretrain.domains: pinned to the domains it was made from, so that it is not made again")
    if config.cold_start and config.cold_start.sft.domains == "all":
        _section(document, "cold_start", "sft")["domains"] = _inline(list(config.domains))
        changes.append("cold_start.sft.domains: pinned to the domains it was made from, so that it is not made again")
    return changes


def _route(document: Any, config: RunConfig, name: str, domain: str, new: bool) -> list[str]:
    """Add the domain to the merge and the evaluation, if they list their domains."""
    changes, merge = [], config.merge
    if merge is not None and (merge.teachers is not None or merge.domains is not None):
        teachers = config.teachers()
        if merge.domains is not None and domain not in merge.domains:
            _section(document, "merge")["domains"] = _inline([*merge.domains, domain])
            changes.append(f"merge.domains: added {domain}")
        if merge.teachers is not None and domain not in teachers:
            _section(document, "merge", "teachers")[domain] = name
            changes.append(f"merge.teachers.{domain}: {name}")
    if new and config.evaluate.domains != "all":
        _section(document, "evaluate")["domains"] = _inline([*config.evaluate.domains, domain])
        changes.append(f"evaluate.domains: added {domain}")
    return changes


def _unroute(document: Any, name: str, domain: str, taught: bool) -> list[str]:
    """Remove the expert from the merge's routes, its baselines' weights and its lists."""
    changes = []
    merge = document.get("merge") or {}
    teachers = merge.get("teachers") or {}
    for routed, given in list(teachers.items()):
        names = [given] if isinstance(given, str) else list(given or ())
        if name in names:
            if len(names) == 1:
                del teachers[routed]
            else:
                del given[name]
            changes.append(f"merge.teachers.{routed}: no longer {name}")
    baselines = merge.get("baselines") or {}
    for baseline in baselines if isinstance(baselines, Mapping) else ():
        weights = (baselines[baseline] or {}).get("weights") or {}
        if name in weights:
            del weights[name]
            changes.append(f"merge.baselines.{baseline}.weights: no longer {name}")
    if not taught and domain in (merge.get("domains") or ()) and domain not in teachers:
        merge["domains"].remove(domain)
        changes.append(f"merge.domains: no longer {domain}")
    return changes


def _replace(path: Path, document: Any, home: Path, drawn: str | None = None) -> list[str]:
    """Replace the file if the new one loads, plans and draws an example; returns what is to run."""
    from base.store.checkpoint import Store
    from flows.plan.graph import build_graph
    from flows.plan.lock import status
    from stages.config.kinds import EVALUATIONS

    with replaced(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            _yaml().dump(document, file)
        try:
            config = load_run_file(temporary)
            graph = build_graph(config, home)
            shown = _first_example(config, drawn) if drawn else []
        except UserError as error:
            raise UserError(f"{path} is unchanged: {error}") from None
        shutil.copymode(path, temporary)
    entries = status(graph, Store(home))
    waiting = [entry.node for entry in entries if not entry.cached]
    stages = [node.id for node in waiting if node.stage not in EVALUATIONS]
    waits = f"to run: {', '.join(stages) or 'no stage'}, and {len(waiting) - len(stages)} evaluations and measurements"
    return [*shown, waits, f"cached: {len(entries) - len(waiting)} of {len(entries)} nodes"]


def _first_example(config: RunConfig, name: str) -> list[str]:
    """Draw an example, because a missing task or data set is not detected anywhere else before the run."""
    entry = config.domains[name]
    domain = load_domain(name, entry.kind, entry.options)
    example = next(iter(domain.draw(TRAIN, 1, 0)))
    if domain.score(example, example.answer) == 0:
        raise UserError(f"domains.{name}: the gold answer {example.answer!r} of {example.prompt!r} scores 0")
    return [f"an example of {name}: {example.prompt!r} → {example.answer!r}"]


def _scaffold(path: Path, asked: NewExpert) -> list[str]:
    """Write a template of a user's own domain, with its test; an existing file is used unchanged."""
    file = asked.module
    assert file is not None
    if file.suffix != OWN_SUFFIX:
        raise UserError(f"--module: {file}: name a Python file, such as {path.parent / 'domains' / asked.name}.py")
    if file.exists():
        return []
    source = (Path(__file__).resolve().parents[2] / "experts" / "scaffold.py").read_text()
    test = file.with_name(f"test_{file.name}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    test.write_text(TEST_OF_SCAFFOLD.format(name=asked.name, file=file.name))
    return [f"{file}: a domain to change; {test}: its test (python -m pytest {test})"]


def _assign(values: dict[str, Any], assignment: str, option: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise UserError(f"{option} '{assignment}': write KEY=VALUE")
    *parents, last = key.split(".")
    for part in parents:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"{option} '{assignment}': '{part}' has no keys")
        values = inner
    values[last] = parse_value(f"{option} '{assignment:.200}'", text)
