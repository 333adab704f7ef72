"""Reads a run file: YAML, dotted overrides, validation. One message reports all mistakes."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from base.documents import MOST_DEPTH, DocumentError, parse_value, read_yaml, user_error
from base.errors import UserError, nearest
from experts.data.sources import located
from experts.domain import OWN_SUFFIX
from experts.loading import KINDS
from flows.run_file.addresses import password_problems
from flows.run_file.hypotheses import hypothesis_problems
from flows.run_file.keys import mistakes
from flows.run_file.programs import place_programs
from flows.run_file.schema import BASE, CHAMPION, COLD_START, STUDENT, MergeConfig, RunConfig
from flows.run_file.variants import overlaid, variant_run
from stages.config.on_policy import OnPolicyConfig

MOST_EXTENDS = 20
# Largest number of merges of a run, over its seeds and rounds.
MOST_MERGES = 500
LONGEST_NAME = 80
NAME_MARKS = "-_.+ "


def load_run_file(path: Path, overrides: list[str] | None = None, max_steps: int | None = None) -> RunConfig:
    """Read and validate a run file.

    Args:
        path: A YAML file.
        overrides: Dotted assignments such as `experts.sort.train.rl.max_steps=50`; values are YAML.
        max_steps: Cap on the steps of every stage, for a small trial of a large run.

    Raises:
        UserError: with all mistakes in one message, each with file, key and the nearest valid choice.
    """
    raw = _read(path)
    for override in overrides or []:
        _apply(raw, override)
    _place_files(raw, path)
    if secrets := password_problems(raw):
        raise UserError("\n".join(f"{path}: {line}" for line in secrets))
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in mistakes(RunConfig, error))) from None
    problems = _dangling_names(config)
    if problems:
        raise UserError("\n".join(f"{path}: {line}" for line in problems))
    return config if max_steps is None else RunConfig.model_validate(_capped(config.model_dump(), max_steps))


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping, merged over the file it extends."""
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such run file{nearest(str(path), siblings)}") from None
    except DocumentError as error:
        raise user_error(path, error) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a run file is a mapping of keys; see flows/runs/lab.yaml")
    if (fault := _unusable(raw)) is not None:
        raise UserError(f"{path}: {fault}")
    _place_files(raw, path)
    if (other := raw.pop("extends", None)) is None:
        return raw
    if not isinstance(other, str):
        raise UserError(f"{path}: extends: name one run file, by its path from this one's folder")
    if len(below) >= MOST_EXTENDS:
        raise UserError(f"{path}: extends: more than {MOST_EXTENDS} run files extend one another")
    try:
        parent, own = (path.parent / other).resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: extends: {other!r}: {error}") from None
    if parent in (*below, own):
        raise UserError(f"{path}: extends: {other} extends this file in turn")
    merged: dict[str, Any] = overlaid(_read(parent, (*below, own)), raw)
    return merged


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside a run file that replaces it at the end; after an error the run file is unchanged.

    Raises:
        UserError: raised by the body; the message names the run file, not the file beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from None
    finally:
        temporary.unlink(missing_ok=True)


def _unusable(value: Any, place: str = "") -> str | None:
    """The first value of a document that no run file may have, with its key; None if there is none.

    YAML does not read the keys `on` and `1` as text, and reads `"\\0"` and `"\\ud800"` as characters that no file can
    hold.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{place}.{key}" if place else str(key)
            if not isinstance(key, str):
                return f"{where}: a key is text; put it in quotes"
            if (fault := _unusable(key, where) or _unusable(inner, where)) is not None:
                return fault
    elif isinstance(value, list):
        return next((fault for each in value if (fault := _unusable(each, place)) is not None), None)
    elif isinstance(value, str) and any(each == "\0" or "\ud800" <= each <= "\udfff" for each in value):
        return f"{place.encode('ascii', 'backslashreplace').decode()}: {value!a:.60} holds a character that is no text"
    return None


def _place_files(raw: dict[str, Any], path: Path) -> None:
    """Resolve the files of domains, of their rows and of objectives from the run file's folder."""
    domains = raw.get("domains")
    for entry in domains.values() if isinstance(domains, dict) else ():
        _place_domain(entry, path.parent)
    place_programs(raw, path.parent)
    for objective in _objectives(raw.get("merge")):
        if isinstance(file := objective.get("path"), str) and OWN_SUFFIX in file:
            objective["path"] = str((path.parent / file).resolve())


def _place_domain(entry: Any, folder: Path) -> None:
    """Resolve the files of a domain's entry, and of the domain that it wraps."""
    if not isinstance(entry, dict):
        return
    kind, options = entry.get("kind"), entry.get("options")
    if isinstance(kind, str) and kind.endswith(OWN_SUFFIX):
        entry["kind"] = str((folder / kind).resolve())
    elif isinstance(options, dict):
        entry["options"] = located(options, folder)
        _place_domain(entry["options"], folder)


def _objectives(merge: Any) -> Iterator[dict[str, Any]]:
    """The objectives of a merge and its variants, where they are mappings."""
    if isinstance(merge, dict):
        variants = merge.get("variants")
        for each in (merge, *(variants.values() if isinstance(variants, dict) else ())):
            if isinstance(each, dict) and isinstance(each.get("objective"), dict):
                yield each["objective"]


def _capped(value: Any, max_steps: int) -> Any:
    """The dumped config with every `max_steps` limited to the cap."""
    if isinstance(value, dict):
        return {k: min(v, max_steps) if k == "max_steps" else _capped(v, max_steps) for k, v in value.items()}
    return value


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': write KEY=VALUE, such as seeds=[0,1,2]")
    *parents, last = key.split(".")
    if not all((*parents, last)) or len(parents) >= MOST_DEPTH:
        raise UserError(f"override '{override:.60}': '{key:.60}' is no dotted key, such as merge.max_steps")
    node: Any = raw
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if node is None:
            raise UserError(f"override '{override}': '{part}' has no keys")
    if not isinstance(node, dict):
        raise UserError(f"override '{override}': '{parents[-1]}' is not a mapping")
    node[last] = parse_value(f"override '{override:.200}'", text)
    if (fault := _unusable(node[last], key)) is not None:
        raise UserError(f"override '{override:.200}': {fault}")


def name_fault(name: str) -> str | None:
    """Why a name is not allowed for a domain, an expert or a variant; None if it is allowed.

    A name is part of a node's name, which `/` and `@` separate, and of files, metrics, tables and pages.
    """
    if len(name) > LONGEST_NAME:
        return f"a name has at most {LONGEST_NAME} characters, this one {len(name)}"
    letters = [each for each in name if each in NAME_MARKS or unicodedata.category(each)[0] in "LMN"]
    if not name or len(letters) < len(name) or not name[0].isalnum() or name[-1] in " .":
        return "a name is made of letters, digits, inner spaces and - _ . +, and begins with a letter or digit"
    return None


class _Names:
    """Collects every reference in a run file to a missing domain, expert or checkpoint."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.problems: list[str] = []
        self.domains, self.experts = list(config.domains), list(config.experts)
        self.starts = [BASE, *([COLD_START] if config.cold_start else []), CHAMPION]

    def check(self, key: str, names: Iterable[str], choices: Iterable[str], what: str) -> None:
        """Note each name at a key that is not among the choices."""
        known = list(choices)
        unknown = [name for name in names if name not in known]
        self.problems += [f"{key}: unknown {what} '{name}'{nearest(name, known)}" for name in unknown]

    def domain_lists(self) -> None:
        """Check names and kinds of domains, and the lists of them."""
        config = self.config
        for key, names in (("domains", self.domains), ("experts", self.experts), ("hypotheses", config.hypotheses)):
            self.problems += [f"{key}.{name!r}: {fault}" for name in names if (fault := name_fault(name))]
        for name, domain in config.domains.items():
            if not domain.kind.endswith(OWN_SUFFIX):
                self.check(f"domains.{name}.kind", [domain.kind], KINDS, "kind")
        for key, choice in (
            ("base.pretrain.domains", config.base.pretrain.domains if config.base.pretrain else "all"),
            ("cold_start.sft.domains", config.cold_start.sft.domains if config.cold_start else "all"),
            ("evaluate.domains", config.evaluate.domains),
        ):
            self.check(key, config.domain_names(choice), self.domains, "domain")
        panel, scored = config.evaluate.expert_panel, config.domain_names(config.evaluate.domains)
        self.check(
            "evaluate.expert_panel", [] if panel in (None, "all") else panel, scored, "domain of evaluate.domains"
        )

    def expert_entries(self) -> None:
        """Check each expert's domain and start."""
        for name, expert in self.config.experts.items():
            self.check(f"experts.{name}.domain", [expert.domain], self.domains, "domain")
            if name in (BASE, COLD_START, STUDENT, CHAMPION):
                self.problems.append(f"experts.{name}: the name is taken by a stage; choose another")
            if expert.start_from is not None:
                self.check(f"experts.{name}.start_from", [expert.start_from], self.starts, "checkpoint")
            method, practice = expert.train.chosen if expert.train else ("", None)
            if isinstance(practice, OnPolicyConfig):
                key = f"experts.{name}.train.{method}"
                self.budget(f"{key}.max_domain_share", practice.max_domain_share, 1)

    def budget(self, key: str, share: float, domains: int) -> None:
        """Check a domain's largest share against the number of domains that share the whole."""
        if domains and share * domains < 1:
            self.problems.append(
                f"{key}: {share:g} for each of {domains} domains does not add up to the whole loss; at least "
                f"{1 / domains:.3g}"
            )

    def merge_entry(self, merge: MergeConfig) -> None:
        """Check the merge's domains, teachers and weights."""
        teachers = [*self.experts, *self.starts]
        self.check("merge.domains", merge.domains or [], self.domains, "domain")
        self.check("merge.anchor.domains", merge.anchor.domains if merge.anchor else [], self.domains, "domain")
        self.check("merge.teachers", merge.teachers or {}, self.domains, "domain")
        for domain, weights in (merge.teachers or {}).items():
            self.check(f"merge.teachers.{domain}", weights, teachers, "expert")
            if merge.domains and domain in self.domains and domain not in merge.domains:
                self.problems.append(f"merge.teachers.{domain}: merge.domains leaves '{domain}' out")
        if merge.start_from is not None:
            self.check("merge.start_from", [merge.start_from], [*self.starts, *self.experts], "checkpoint")
        if merge.fallback_teacher is not None:
            self.check("merge.fallback_teacher", [merge.fallback_teacher], teachers, "expert")
        practised = [domain for domain in self.config.practised() if domain in self.domains]
        self.budget("merge.max_domain_share", merge.max_domain_share, len(practised))
        self.check("merge.domain_weights", merge.domain_weights, practised, "domain of the merge")


def _dangling_names(config: RunConfig) -> list[str]:
    names = _Names(config)
    merges = len(config.seeds) * (config.merge.rounds if config.merge else 1)
    if merges > MOST_MERGES:
        names.problems.append(f"merge.rounds: {merges:,} merges with {len(config.seeds)} seeds; at most {MOST_MERGES}")
    names.domain_lists()
    names.expert_entries()
    if config.merge:
        names.merge_entry(config.merge)
        for name in config.merge.variants:
            names.problems += _variant_problems(config, name)
    return [*names.problems, *hypothesis_problems(config)]


def _variant_problems(config: RunConfig, name: str) -> list[str]:
    """The problems of a variant of the merge, named by its own keys."""
    if fault := name_fault(name):
        return [f"merge.variants.{name!r}: {fault}"]
    try:
        variant = variant_run(config, name)
    except UserError as error:
        return [str(error)]
    assert variant.merge is not None
    names = _Names(variant)
    names.merge_entry(variant.merge)
    return [f"merge.variants.{name}.{problem.removeprefix('merge.')}" for problem in names.problems]
