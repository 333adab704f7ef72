"""Writes a first run file from a base and a few domains: small, commented, and valid for `plan --check`. Torch-free."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.documents import parse_value
from base.errors import UserError, nearest
from experts.data.files import file_format
from experts.data.guess import guess_options
from experts.data.sources import located, typed, typed_options
from experts.domain import OWN_SUFFIX, TRAIN
from experts.loading import KINDS, load_domain
from flows.run_file.load import load_run_file, replaced
from flows.scaffold.init_templates import Sizes, Skill, run_file

# A model pretrained by the run itself, as small as the lab's.
TINY = "tiny"
TASK_KINDS = ("strings", "reasoning")
LOOKED_AT = 100
_TINY_CONTEXTS = (128, 256, 512, 1024)


def init(path: Path, base: str, domains: Sequence[str], options: Sequence[str], *, gpus: int, force: bool) -> list[str]:
    """Write a run file.

    Args:
        path: The file; its stem is the run's name.
        base: `tiny`, a GGUF file, a folder, or a Hugging Face id.
        domains: `NAME=DATA`: a data file, folder or Hub id, `KIND:TASK`, `code_edit`, or a Python file.
        options: `NAME.KEY=VALUE` for a domain's options, with YAML values.
        gpus: Devices of each training stage.
        force: Replace an existing file.

    Returns:
        A line for each domain with what was detected, for the user to check.

    Raises:
        UserError: the file exists already, or an argument cannot be used; nothing is written then.
        ConnectionError: the Hub cannot be reached.
    """
    if path.exists() and not force:
        raise UserError(f"{path} exists already; choose another name, or --force replaces it")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
    given = _options(options, [name for name, _ in map(_split, domains)])
    skills = [_skill(name, data, given.get(name, {}), path.parent) for name, data in map(_split, domains)]
    sizes = _sizes(base, skills, gpus)
    text = run_file(path.stem, _base(base, path.parent, sizes), skills, sizes)
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        load_run_file(temporary)
    return [_summary(skill) for skill in skills]


def _split(asked: str) -> tuple[str, str]:
    name, separator, data = asked.partition("=")
    if not separator or not name or not data:
        raise UserError(f"--domain '{asked}': write NAME=DATA, such as maths=data/maths.jsonl or spelling=strings:sort")
    return name, data


def _options(asked: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--domain: '{twice}' is named twice")
    for assignment in asked:
        key, separator, text = assignment.partition("=")
        name, dot, option = key.partition(".")
        if not separator or not dot or not option:
            raise UserError(f"--option '{assignment}': write NAME.KEY=VALUE, such as maths.scorer=numeric")
        if name not in names:
            raise UserError(f"--option '{assignment}': no --domain '{name}'{nearest(name, names)}")
        found.setdefault(name, {})[option] = parse_value(f"--option '{assignment:.200}'", text)
    return found


def _skill(name: str, data: str, options: Mapping[str, Any], folder: Path) -> Skill:
    """Detect the kind of the data and draw some examples."""
    kind, colon, task = data.partition(":")
    if kind in TASK_KINDS and colon:
        own: dict[str, Any] = {"task": task} if kind == "strings" else {"tasks": {task: {}}}
        return _drawn(name, kind, {**own, **options}, folder)
    if data in KINDS and data not in ("hub", "judge"):
        return _drawn(name, data, options, folder)
    path = typed(data, folder)
    if data.endswith(OWN_SUFFIX):
        return _drawn(name, path, options, folder)
    if "/" not in data and not os.path.exists(data) and file_format(Path(data)) is None:
        raise UserError(
            f"--domain {name}: '{data}' is neither a file nor a Hub id (owner/name) nor a kind{nearest(data, KINDS)}; "
            f"tasks are named as strings:sort or reasoning:spell_backward"
        )
    return _drawn(name, "hub", guess_options(path, folder, typed_options(options, folder)), folder)


def _drawn(name: str, kind: str, options: Mapping[str, Any], folder: Path) -> Skill:
    place = str((folder / kind).resolve()) if kind.endswith(OWN_SUFFIX) else kind
    domain = load_domain(name, place, located(options, folder))
    examples = domain.draw_up_to(LOOKED_AT, TRAIN, 0)
    if not examples:
        raise UserError(f"--domain {name}: no examples to train on")
    return Skill(name, kind, options, examples)


def _sizes(base: str, skills: Sequence[Skill], gpus: int) -> Sizes:
    """Lengths from the examples: a tiny model's tokens are characters; for other models half as many are assumed."""
    tiny = base == TINY
    answers = {skill.name: skill.longest_answer for skill in skills}
    if tiny:
        longest = max(skill.longest_chat for skill in skills) + 16
        context = next((size for size in _TINY_CONTEXTS if size >= longest), None)
        if context is None:
            raise UserError(
                f"--base {TINY}: the longest example has {longest} characters but the largest tiny model reads "
                f"{_TINY_CONTEXTS[-1]}; name a real base"
            )
        return Sizes(tiny, gpus, context, {name: length + 4 for name, length in answers.items()})
    return Sizes(
        tiny, gpus, None, {name: max(32, -(-(length // 2 + 16) // 16) * 16) for name, length in answers.items()}
    )


def _base(base: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    if sizes.tiny:
        return {}
    local = os.path.exists(base)
    place = os.path.abspath(base) if local else base
    if base.endswith(".gguf"):
        if not local and not base.startswith("package://"):
            raise UserError(f"--base: no such file '{base}'")
        return {"gguf": place}
    if not local and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise UserError(f"--base: no such folder '{base}'; write {TINY}, a folder, a .gguf file or a Hugging Face id")
    return {"checkpoint": place}


def _summary(skill: Skill) -> str:
    example = skill.examples[0]
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    options = ", ".join(f"{key} {value}" for key, value in skill.options.items() if key != "path")
    shown = f"{prompt[:60]!r} → {example.answer[:40]!r}"
    return f"{skill.name}: {skill.kind}, {options or 'no options'}; {skill.method}; {shown}"
