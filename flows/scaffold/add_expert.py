"""An expert goes into a run file or out of it; the file's comments and layout stay. Torch-free.

What would be trained again because of a longer list of domains is pinned first: a pretrained base and a cold start keep
the domains they were made from.
"""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.documents import one_line, parse_value
from base.errors import UserError, nearest
from experts.data.sources import typed_options
from experts.domain import OWN_SUFFIX, TRAIN
from experts.loading import KINDS, load_domain
from flows.run_file.load import load_run_file, replaced
from flows.run_file.schema import RunConfig
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
    """What a person asks for.

    Attributes:
        name: The expert's name; also the new domain's, where `domain` is a kind.
        domain: A domain of the run file, or the kind of a new one.
        tasks: Tasks of a `strings` or `reasoning` domain.
        options: Options of the new domain, `KEY=VALUE` with YAML values.
        method: How it is trained; as `like` is, or as the first expert, where None.
        like: Expert of the run file whose settings are copied.
        settings: Training settings that differ, `KEY=VALUE`.
        checkpoint: An expert trained elsewhere, in place of training.
        module: File of a domain of one's own, written from the scaffold where it is not there; in place of a kind.
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
    """Write an expert, and its domain where it is new, into a run file.

    Args:
        path: The run file; replaced whole, and only by one that loads and plans.
        asked: The expert.
        home: `$MOPD_HOME`, to plan with.

    Returns:
        What was done, and what is to run now.

    Raises:
        UserError: the expert is there already, or what it names is not; the file is as it was.
    """
    config = load_run_file(path)
    if asked.name in config.experts:
        raise UserError(f"{path}: experts.{asked.name} is there already; `mopd remove-expert` takes it out")
    document = _read(path)
    said: list[str] = []
    if asked.module is not None:
        said += _scaffold(path, asked)
    domain, entry = _domain(path, config, asked)
    if entry is not None:
        said += _pin_lists(document, config)
        _section(document, "domains")[domain] = entry
        said.append(f"domains.{domain}: {_flow(entry)}")
    expert = {"domain": domain} | ({"checkpoint": asked.checkpoint} if asked.checkpoint else _training(config, asked))
    _section(document, "experts")[asked.name] = expert
    said.append(f"experts.{asked.name}: {_flow(expert)}")
    said += _route(document, config, asked.name, domain, entry is not None)
    return [*said, *_replace(path, document, home, drawn=domain)]


def remove_expert(path: Path, name: str, home: Path, *, with_domain: bool) -> list[str]:
    """Take an expert out of a run file; its checkpoint and lineage stay in the store.

    Args:
        path: The run file; replaced whole, and only by one that loads and plans.
        name: The expert.
        home: `$MOPD_HOME`, to plan with.
        with_domain: Also take out its domain, where nothing else names it. Else it goes on being measured.

    Raises:
        UserError: there is no such expert, or something else still needs it; the file is as it was.
    """
    config = load_run_file(path)
    if name not in config.experts:
        raise UserError(f"{path}: there is no experts.{name}{nearest(name, config.experts)}")
    document = _read(path)
    if name not in (document.get("experts") or {}):
        raise UserError(f"{path}: experts.{name} stands in {document.get('extends')}, which this file extends")
    domain = config.experts[name].domain
    del document["experts"][name]
    said = [f"experts.{name}: removed; its checkpoint stays in the store, {_where(config, name, home)}"]
    said += _unroute(document, name, domain, any(e.domain == domain for n, e in config.experts.items() if n != name))
    if with_domain:
        if domain not in (document.get("domains") or {}):
            raise UserError(f"{path}: domains.{domain} stands in {document.get('extends')}, which this file extends")
        del document["domains"][domain]
        said.append(f"domains.{domain}: removed")
    elif domain in (document.get("domains") or {}):
        said.append(f"domains.{domain}: stays, and is measured; --with-domain takes it out too")
    return [*said, *_replace(path, document, home)]


def _where(config: RunConfig, name: str, home: Path) -> str:
    """The commands that show a former expert's lineage, one for each seed."""
    from flows.plan.graph import build_graph

    graph = build_graph(config, home)
    keys = [node.key for node in graph.checkpoints if node.name == f"experts/{name}"]
    return "and its lineage is shown by " + ", ".join(f"`mopd lineage {key}`" for key in keys)


def _domain(path: Path, config: RunConfig, asked: NewExpert) -> tuple[str, dict[str, Any] | None]:
    """The domain's name, and its entry where it is new."""
    kind = asked.domain
    if asked.module is not None:
        kind = os.path.relpath(asked.module.resolve(), path.parent.resolve())
    if kind is None:
        raise UserError("--domain: name a domain of the run file, or the kind of a new one")
    if kind in config.domains:
        if asked.tasks or asked.options:
            raise UserError(f"--task and --option are for a new domain; '{kind}' is one of {path}")
        return kind, None
    if kind not in KINDS and not kind.endswith(OWN_SUFFIX):
        hint = nearest(kind, [*config.domains, *KINDS])
        raise UserError(f"--domain: '{kind}' is neither a domain of {path} nor a kind of domain{hint}")
    if asked.name in config.domains:
        raise UserError(f"{path}: domains.{asked.name} is there already; --domain {asked.name} trains an expert in it")
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
        raise UserError(f"--task: a strings domain has one, not {len(tasks)}")
    return {"task": tasks[0]}


def _training(config: RunConfig, asked: NewExpert) -> dict[str, Any]:
    """The new expert's `train`, as another is trained."""
    trained = {name: expert.train for name, expert in config.experts.items() if expert.train}
    if asked.like is not None and asked.like not in trained:
        raise UserError(f"--like: no expert '{asked.like}' is trained in this run{nearest(asked.like, trained)}")
    if asked.method is not None and asked.method not in EXPERT_METHODS:
        raise UserError(
            f"--train: '{asked.method}' is none of {', '.join(EXPERT_METHODS)}{nearest(asked.method, EXPERT_METHODS)}"
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
    """Say by name what `all` meant for the base and the cold start, so that neither is made again."""
    said = []
    if config.base.pretrain and config.base.pretrain.domains == "all":
        _section(document, "base", "pretrain")["domains"] = _inline(list(config.domains))
        said.append("base.pretrain.domains: those it was made from, by name, so that it is not made again")
    if config.cold_start and config.cold_start.sft.domains == "all":
        _section(document, "cold_start", "sft")["domains"] = _inline(list(config.domains))
        said.append("cold_start.sft.domains: those it was made from, by name, so that it is not made again")
    return said


def _route(document: Any, config: RunConfig, name: str, domain: str, new: bool) -> list[str]:
    """Let the merge and the evaluation take the domain, where they list theirs."""
    said, merge = [], config.merge
    if merge is not None and (merge.teachers is not None or merge.domains is not None):
        teachers = config.teachers()
        if merge.domains is not None and domain not in merge.domains:
            _section(document, "merge")["domains"] = _inline([*merge.domains, domain])
            said.append(f"merge.domains: and {domain}")
        if merge.teachers is not None and domain not in teachers:
            _section(document, "merge", "teachers")[domain] = name
            said.append(f"merge.teachers.{domain}: {name}")
    if new and config.evaluate.domains != "all":
        _section(document, "evaluate")["domains"] = _inline([*config.evaluate.domains, domain])
        said.append(f"evaluate.domains: and {domain}")
    return said


def _unroute(document: Any, name: str, domain: str, taught: bool) -> list[str]:
    """Take the expert out of the merge's routes, its baselines' weights and its lists."""
    said = []
    merge = document.get("merge") or {}
    teachers = merge.get("teachers") or {}
    for routed, given in list(teachers.items()):
        names = [given] if isinstance(given, str) else list(given or ())
        if name in names:
            if len(names) == 1:
                del teachers[routed]
            else:
                del given[name]
            said.append(f"merge.teachers.{routed}: no longer {name}")
    baselines = merge.get("baselines") or {}
    for baseline in baselines if isinstance(baselines, Mapping) else ():
        weights = (baselines[baseline] or {}).get("weights") or {}
        if name in weights:
            del weights[name]
            said.append(f"merge.baselines.{baseline}.weights: no longer {name}")
    if not taught and domain in (merge.get("domains") or ()) and domain not in teachers:
        merge["domains"].remove(domain)
        said.append(f"merge.domains: no longer {domain}")
    return said


def _replace(path: Path, document: Any, home: Path, drawn: str | None = None) -> list[str]:
    """Put the new file in the old one's place if it loads, plans and draws an example; say what is to run."""
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
            raise UserError(f"{path} is as it was: {error}") from None
        shutil.copymode(path, temporary)
    entries = status(graph, Store(home))
    waiting = [entry.node for entry in entries if not entry.cached]
    stages = [node.id for node in waiting if node.stage not in EVALUATIONS]
    said = f"to run: {', '.join(stages) or 'no stage'}, and {len(waiting) - len(stages)} evaluations and measurements"
    return [*shown, said, f"cached: {len(entries) - len(waiting)} of {len(entries)} nodes"]


def _first_example(config: RunConfig, name: str) -> list[str]:
    """Draw an example, for a task or a data set that is not there shows nowhere else before the run."""
    entry = config.domains[name]
    domain = load_domain(name, entry.kind, entry.options)
    example = next(iter(domain.draw(TRAIN, 1, 0)))
    if domain.score(example, example.answer) == 0:
        raise UserError(f"domains.{name}: the gold answer {example.answer!r} of {example.prompt!r} scores 0")
    return [f"an example of {name}: {example.prompt!r} → {example.answer!r}"]


def _scaffold(path: Path, asked: NewExpert) -> list[str]:
    """Write a domain of one's own with its test, to be changed; a file that is there is taken as it is."""
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
            raise UserError(f"{option} '{assignment}': '{part}' holds no keys")
        values = inner
    values[last] = parse_value(f"{option} '{assignment:.200}'", text)


def _yaml() -> Any:
    """A reader and writer that keeps comments, quotes and layout."""
    from ruamel.yaml import YAML

    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 120
    parser.indent(mapping=2, sequence=4, offset=2)
    parser.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return parser


def _read(path: Path) -> Any:
    return _yaml().load(path.read_text())


def _section(document: Any, *keys: str) -> Any:
    """The mapping at these keys, made where it is missing."""
    for key in keys:
        if document.get(key) is None:
            document[key] = {}
        document = document[key]
    return document


def _inline(names: Sequence[str]) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    listed = CommentedSeq(names)
    listed.fa.set_flow_style()
    return listed


def _flow(entry: Mapping[str, Any]) -> str:
    """An entry in one line."""
    return one_line(copy.deepcopy(dict(entry)))
