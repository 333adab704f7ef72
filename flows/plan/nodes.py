"""Nodes of a run's graph: stages and evaluations with their parents, ingredients and content keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.plan.templates import DATE
from flows.run_file.schema import RunConfig
from stages.config.kinds import EVALUATIONS, SCORINGS
from stages.rows.rendering import Rendering


@dataclass(frozen=True)
class Node:
    """One stage or evaluation of the graph.

    Attributes:
        id: Unique in the graph: `name@seed`, or the bare name of a node shared by all seeds.
        name: `base`, `cold_start`, `experts/NAME`, `student`, `eval/CHECKPOINT/DOMAIN/SPLIT`, `shift/CHECKPOINT`, or
            `cosines`.
        stage: Which stage makes it: a key of `STAGES`.
        seed: Seed of everything random in it.
        config: The stage's own config, as JSON-serialisable values.
        parents: role -> node id: `start`, `teacher/DOMAIN` (`teacher/DOMAIN/TEACHER` where several teach it),
            `expert/NAME`, or `checkpoint`.
        domains: name -> `{"kind", "options"}` of the domains it draws from.
        ingredients: The hashed values; compared with the last run's to explain why a node must run.
        key: The content key.
    """

    id: str
    name: str
    stage: str
    seed: int
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    domains: Mapping[str, Mapping[str, Any]]
    ingredients: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class StageGraph:
    """The nodes in an order in which parents come first, and what the run pins."""

    config: RunConfig
    nodes: tuple[Node, ...]
    pins: Mapping[str, str]

    @property
    def rendering(self) -> Rendering:
        """How its nodes render chat templates."""
        return Rendering(self.config.chat_template_kwargs, self.pins.get(DATE))

    def node(self, node_id: str) -> Node:
        """The node with this id."""
        return next(node for node in self.nodes if node.id == node_id)

    def evaluations(self, checkpoint_id: str) -> list[Node]:
        """The evaluations that score one checkpoint."""
        return [n for n in self.nodes if n.stage in SCORINGS and n.parents["checkpoint"] == checkpoint_id]

    @property
    def checkpoints(self) -> list[Node]:
        """The nodes that make checkpoints."""
        return [node for node in self.nodes if node.stage not in EVALUATIONS]
