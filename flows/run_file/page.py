"""`docs/run-file.md`: every key of a run file, written from the schema. Free of torch, prefect and mlflow.

`python -m flows.run_file.page` prints the page. Each model of the schema has a section with a table. A base class of
several models, or a model used at several places, has one section too, and the other sections link to it.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evals.tables.markdown import code
from evals.tables.templates import text
from experts.data.rows import RowOptions
from experts.loading import KINDS
from flows.run_file.baselines import FIXED, MIX_RL, MIX_SFT, SEQKD, WEIGHT_MERGES
from flows.run_file.keys import inner_models, type_of
from flows.run_file.page_words import in_yaml, listed, plain_type, prose, size_of
from flows.run_file.schema import BaselinesConfig, DomainConfig, MergeConfig, RunConfig
from flows.run_file.variants import BESIDE
from stages.config.distill import DistillSettings
from stages.config.merge import WeightMergeConfig
from stages.config.objective import Objective, Restrictable, TargetObjective
from stages.config.on_policy import OnPolicyConfig, RLConfig
from stages.config.training import SFTConfig, TrainConfig

Model = type[BaseModel]

OPTIONS, WEIGHT_MERGE = "domains.NAME.options", "merge.baselines.NAME (weight merges)"
# Headings of the base classes; the heading of a model used at several places is its key.
SHARED: dict[Model, str] = {
    TrainConfig: "All training stages",
    RowOptions: "Rows of a data set",
    OnPolicyConfig: "All on-policy stages",
    Objective: "All objectives",
    TargetObjective: "Objectives with a target",
    Restrictable: "Objectives with a top-k form",
}


def run_file_page() -> str:
    """The whole page as Markdown: the contents, then a section for each model in the order of the schema."""
    return _Page().text()


def page_rows() -> dict[str, list[str]]:
    """Heading of each section, as text -> the keys of its table."""
    page = _Page()
    return {section.heading.replace("`", ""): page.keys(section.model) for section in page.sections}


@dataclass(frozen=True, slots=True)
class _Section:
    """A model with the dotted keys at which it is used; no keys if it is only a base class."""

    model: Model
    heading: str
    places: tuple[str, ...]

    @property
    def link(self) -> str:
        """Its heading, with a link."""
        return self.linked(self.heading)

    def linked(self, text: str) -> str:
        """A text with a link to the heading, by the anchor that GitHub and most others give it."""
        anchor = re.sub(r"[^\w\- ]", "", self.heading.lower()).replace(" ", "-")
        return f"[{text}](#{anchor})"


class _Page:
    """The sections of the page."""

    def __init__(self) -> None:
        self.places: dict[Model, list[str]] = {}
        for model, place in _walk(RunConfig, ""):
            places = self.places.setdefault(model, [])
            places += [] if place in places else [place]

    @cached_property
    def sections(self) -> list[_Section]:
        """Models used once, then shared ones: base classes with their fields' models, then the rest."""
        alone = [model for model, places in self.places.items() if len(places) == 1]
        order = [*alone]
        for base in SHARED:
            inner = [model for field in base.model_fields.values() for model in inner_models(field.annotation)]
            order += [base, *(model for model in inner if model not in order)]
        order += [model for model in self.places if model not in order]
        return [_Section(model, self._heading(model), tuple(self.places.get(model, ()))) for model in order]

    def _heading(self, model: Model) -> str:
        if model in SHARED:
            return SHARED[model]
        places = self.places[model]
        if len(places) > 1:
            return f"`{places[0].rpartition('.')[2]}`"
        place, _, kind = places[0].partition(" ")
        return " ".join(filter(None, (f"`{place}`" if place else "Top level", kind)))

    @cached_property
    def by_model(self) -> dict[Model, _Section]:
        """The section of each model that has one."""
        return {section.model: section for section in self.sections}

    def above(self, model: Model) -> list[_Section]:
        """The sections whose keys a model inherits, the nearest first."""
        return [self.by_model[base] for base in model.__mro__[1:] if base in self.by_model]

    def keys(self, model: Model) -> list[str]:
        """A section's own keys, in source order: those that the model adds or redefines.

        If the model is only a base class, keys that every subclass redefines are left out.
        """
        above = self.above(model)
        inherited: Model = above[0].model if above else BaseModel
        written = (name for one in model.__mro__ for name in inspect.get_annotations(one) if name in model.model_fields)
        own = [name for name in dict.fromkeys(written) if _origin(model, name) is not _origin(inherited, name)]
        if model in self.places:
            return own
        heirs = [heir for heir in self.places if issubclass(heir, model)]
        return [name for name in own if any(_origin(heir, name) is _origin(model, name) for heir in heirs)]

    def text(self) -> str:
        """The page."""
        groups: dict[str, list[str]] = {}
        for section in self.sections:
            top = section.places[0].partition(".")[0] if len(section.places) == 1 else "(shared)"
            groups.setdefault(top, []).append(section.link)
        shown = {"groups": groups.values(), "sections": self.sections, "page": self}
        return text("flows.run_file", "run-file.md", listed=listed, prose=prose, **shown) + "\n"

    def description(self, section: _Section) -> str:
        """The docstring of a section's model."""
        return prose(inspect.getdoc(section.model) or "")

    def heirs(self, section: _Section) -> list[str]:
        """Links to the sections of the models that a base class has; empty for other sections."""
        if section.model in self.places:
            return []
        return [heir.link for heir in self.sections if heir.places and issubclass(heir.model, section.model)]

    def used_at(self, section: _Section) -> list[str]:
        """The places of a model used at several."""
        return [self._place(place) for place in section.places] if len(section.places) > 1 else []

    def replaced(self, section: _Section) -> list[str]:
        """The keys of a section that replace inherited ones."""
        theirs = {key for other in self.above(section.model) for key in self.keys(other.model)}
        return [code(key) for key in self.keys(section.model) if key in theirs]

    def rows(self, section: _Section) -> list[tuple[str, ...]]:
        """The cells of a section's table."""
        properties = section.model.model_json_schema()["properties"]
        return [self._row(section.model, name, properties[name]) for name in self.keys(section.model)]

    def _place(self, place: str) -> str:
        """A dotted place, with a link to the section it is a key of."""
        holder = place.rpartition(".")[0]
        found = (section.linked(code(place)) for section in self.sections if section.places == (holder,))
        return next(found, code(place))

    def _row(self, model: Model, name: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
        field = model.model_fields[name]
        if (model, name) == (WeightMergeConfig, "method"):
            default = "the baseline's NAME; not a key"
        elif field.is_required():
            default = "required"
        else:
            default = code(in_yaml(field.get_default(call_default_factory=True, validated_data={})))
        type_text = self._untyped(model, name) or self._type(schema, name)
        return code(name), type_text, default, prose(field.description or "")

    def _untyped(self, model: Model, name: str) -> str:
        """The type of a key whose content the schema leaves to others; empty for all other keys."""
        merge = self.by_model[MergeConfig].link
        if (model, name) == (DomainConfig, "options"):
            kinds = [self.by_model[options].linked(code(kind)) for kind, options in _kinds().items()]
            return f"map: keys of the kind {listed(kinds, 'or')}"
        if (model, name) == (MergeConfig, "variants"):
            return f"map of name → keys of {merge} without {listed([code(key) for key in sorted(BESIDE)], 'and')}"
        if name == "objective":
            types = inner_models(model.model_fields[name].annotation)
            return (
                f"text, or keys of the type {listed([self.by_model[t].linked(code(type_of(t))) for t in types], 'or')}"
            )
        if model is not BaselinesConfig:
            return ""
        if name == SEQKD:
            taken = DistillSettings.model_fields.keys() - set(FIXED[SEQKD])
            others = [code(key) for key in MergeConfig.model_fields if key not in taken]
            return f"`null` or keys of {merge} without {listed(others, 'and')}"
        schemas: dict[str, Model] = {MIX_SFT: SFTConfig, MIX_RL: RLConfig}
        return f"`null` or keys of {self.by_model[schemas.get(name, WeightMergeConfig)].link}"

    def _type(self, schema: Mapping[str, Any], name: str) -> str:
        """A type of JSON schema in words."""
        if reference := schema.get("$ref", "").rpartition("/")[2]:
            links = (section.link for section in self.sections if section.model.__name__ == reference)
            return next(links, "any value")
        if "anyOf" in schema:
            # The short ones first: "list of 2, each text or `null`" would be ambiguous.
            choices = sorted(schema["anyOf"], key=lambda choice: (choice.get("type") != "null", "const" not in choice))
            return listed([self._type(choice, name) for choice in choices], "or")
        if schema.get("type") == "array":
            return self._list(schema, name)
        if schema.get("type") == "object":
            size = " of at least one" if schema.get("minProperties") else " of"
            inner = schema.get("additionalProperties")
            return f"map{size} name → {self._type(inner, name) if isinstance(inner, Mapping) else 'any value'}"
        return plain_type(schema, name)

    def _list(self, schema: Mapping[str, Any], name: str) -> str:
        items = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
        size, each = size_of(schema, "Items"), self._type(items, name)
        if each != "text":
            return f"list{size}, each {each}"
        return f"list{size} text{'' if size.endswith(' 1') else 's'}" if size else "list of text"


def _walk(model: Model, place: str) -> Iterator[tuple[Model, str]]:
    """Every model of the run file with each dotted key at which it is used, in schema order."""
    yield model, place
    for name, field in model.model_fields.items():
        for inner, key in _inner(model, name, field):
            # The type or kind after a space is no part of the key.
            yield from _walk(inner, f"{place.partition(' ')[0]}.{key}" if place and inner not in _placed() else key)


def _inner(model: Model, name: str, field: FieldInfo) -> Iterator[tuple[Model, str]]:
    """The models of a field: the one it is made of, or those that its mapping is read with."""
    if (model, name) == (DomainConfig, "options"):
        yield from ((options, f"{OPTIONS} (kind: {kind})") for kind, options in _kinds().items())
    elif (model, name) == (BaselinesConfig, WEIGHT_MERGES[0]):
        yield WeightMergeConfig, WEIGHT_MERGE
    elif len(inner := inner_models(field.annotation)) > 1:
        yield from ((each, f"{name} (type: {type_of(each)})") for each in inner)
    elif inner:
        yield inner[0], f"{name}.NAME" if getattr(field.annotation, "__origin__", None) is dict else name


def _placed() -> set[Model]:
    """The models that `_inner` names by their whole place."""
    return {WeightMergeConfig, *_kinds().values()}


def _kinds() -> dict[str, Model]:
    """Kind of domain -> its options."""
    return {kind: importlib.import_module(module).Options for kind, module in KINDS.items()}


def _origin(model: Model, name: str) -> type | None:
    """The last class in the inheritance order that defines a key; None where a model has no such key."""
    if name not in model.model_fields:
        return None
    return next(one for one in model.__mro__ if name in inspect.get_annotations(one))


if __name__ == "__main__":
    sys.stdout.write(run_file_page())
