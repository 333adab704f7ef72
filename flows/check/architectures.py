"""Checks from their configs whether imported checkpoints have an architecture that stages can train."""

from collections.abc import Iterator, Sequence
from typing import Any

from base.documents import DocumentError, read_object
from base.errors import UserError, first_line
from base.store.checkpoint import Store
from base.store.foreign import CONFIG, MOST_BYTES, config_fault
from flows.plan.nodes import Node, StageGraph
from flows.plan.templates import of_hub
from flows.run_file.rounds import without_round
from flows.run_file.schema import BASE
from stages.model.remote_code import OWN_CODE


def architecture_problems(graph: StageGraph, store: Store, missing: Sequence[Node]) -> Iterator[str]:
    """Yield a message for each imported checkpoint that missing nodes depend on and that no stage can use.

    A GGUF file is checked when it is imported.
    """
    loads = {node.id: node for node in missing if node.stage == "load"}
    for parent in (parent for node in missing for parent in node.parents.values()):
        if (node := graph.node(parent)).stage == "load":
            loads[node.id] = node
    for node in loads.values():
        try:
            _check(node, store, graph.config.remote_code)
        except UserError as error:
            yield str(error)


def _check(node: Node, store: Store, remote_code: bool) -> None:
    """Check the config of an imported checkpoint, if it can be read already.

    Raises:
        UserError: no stage can use it.
    """
    artifact = store.find(node.key)
    if artifact is None and node.config["kind"] == "gguf":
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from stages.model.architecture import unsupported

    place = f"{checkpoint_key(node)}: {node.config['location']}"
    if artifact is None and node.config["kind"] == "hub":
        # A directory was checked when it was found.
        _check_hub(place, node.config["location"], node.config["revision"])
    config = _config(place, artifact.uri if artifact else node.config["location"], node, artifact is None, remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if not getattr(config, "auto_map", None):
            raise UserError(f"{place}: {config.model_type} is not a causal language model")
        if not remote_code:
            raise UserError(f"{place}: {OWN_CODE}")
    try:
        fault = unsupported(config)
    except Exception as error:  # it reads attributes that any config class may lack
        raise UserError(f"{place}: its config.json cannot be used: {first_line(error)}") from error
    if fault:
        raise UserError(f"{place}: {config.model_type} {fault}")


def _config(place: str, location: str, node: Node, revised: bool, remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        revision = node.config["revision"] if revised else None
        return AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=remote_code)
    except Exception as error:  # each config class has its own checks and errors
        code = "trust_remote_code" in str(error)
        fault = OWN_CODE if code else f"its config.json cannot be used: {first_line(error)}"
        raise UserError(f"{place}: {fault}") from error


def _check_hub(place: str, location: str, revision: str | None) -> None:
    file = of_hub(location, revision, CONFIG)
    try:
        fault = None if file is None else config_fault(read_object(file, MOST_BYTES[CONFIG]))
    except DocumentError as error:
        fault = str(error)
    if fault:
        raise UserError(f"{place}: {CONFIG}: {fault}")


def checkpoint_key(node: Node) -> str:
    """The run file's key of an imported checkpoint."""
    kind, _, name = without_round(node.name).partition("/")
    return "base.checkpoint" if kind == BASE else f"experts.{name}.checkpoint"
