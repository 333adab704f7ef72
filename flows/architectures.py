"""Whether checkpoints from elsewhere are of an architecture that stages can train, read from their configs alone."""

from collections.abc import Iterator, Sequence

from flows.config import BASE
from flows.plan import Node, StageGraph
from flows.rounds import without_round
from stages.core.checkpoint import Store
from stages.core.remote_code import options


def architecture_problems(graph: StageGraph, store: Store, missing: Sequence[Node]) -> Iterator[str]:
    """A message for each imported checkpoint that missing nodes rest on and that no stage can use.

    A GGUF file is looked at when it is imported.
    """
    loads = {node.id: node for node in missing if node.stage == "load"}
    for parent in (parent for node in missing for parent in node.parents.values()):
        if (node := graph.node(parent)).stage == "load":
            loads[node.id] = node
    for node in loads.values():
        if (fault := _fault(node, store)) is not None:
            yield fault


def _fault(node: Node, store: Store) -> str | None:
    artifact = store.find(node.key)
    if artifact is None and node.config["kind"] == "gguf":
        return None
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from stages.core.architecture import unsupported

    location = artifact.uri if artifact else node.config["location"]
    revision = None if artifact else node.config["revision"]
    key = _config_key(node)
    try:
        config = AutoConfig.from_pretrained(location, revision=revision, **options())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{key}: {node.config['location']}: its config.json cannot be used: {str(error).splitlines()[0]}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        return f"{key}: {node.config['location']}: {config.model_type} is no causal language model"
    fault = unsupported(config)
    return f"{key}: {node.config['location']}: {config.model_type} {fault}" if fault else None


def _config_key(node: Node) -> str:
    """Where in the run file an imported checkpoint stands."""
    kind, _, name = without_round(node.name).partition("/")
    return "base.checkpoint" if kind == BASE else f"experts.{name}.checkpoint"
