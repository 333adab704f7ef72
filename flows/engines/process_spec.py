"""The spec file: what one node process makes, written for `flows.engines.worker`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from base.hashing import stable_hash
from base.store.checkpoint import write_whole
from flows.plan.lock import code_fingerprint
from flows.plan.nodes import Node, StageGraph
from stages.config.kinds import STAGES
from stages.rows.rendering import Rendering


@dataclass(frozen=True)
class ProcessSpec:
    """The nodes that one process makes, with all the worker needs to make them.

    Attributes:
        nodes: One training node, or several evaluations of one checkpoint.
        contents: The contents of the spec file without the servers.
    """

    nodes: tuple[Node, ...]
    contents: Mapping[str, Any]

    @classmethod
    def of(
        cls, graph: StageGraph, nodes: Sequence[Node], home: Path, threads: int, timeout_minutes: float | None = None
    ) -> Self:
        """Collect what a process needs to make `nodes`.

        Args:
            graph: The run.
            nodes: One training node, or several evaluations of one checkpoint.
            home: `$MOPD_HOME`.
            threads: CPU threads of the process.
            timeout_minutes: Longest time of the node, and so of a collective of its processes; torch's own time-outs
                if absent.

        Raises:
            ValueError: the nodes cannot share a process.
        """
        kinds = {(node.stage, node.parents.get("checkpoint")) for node in nodes}
        if len(kinds) != 1 or (len(nodes) > 1 and not STAGES[nodes[0].stage].together):
            raise ValueError("one process makes one training node or evaluations of one checkpoint")
        contents: dict[str, Any] = {
            "home": str(home),
            "threads": threads,
            "nodes": [_node_spec(graph, node) for node in nodes],
        }
        if timeout_minutes is not None:
            contents["timeout_minutes"] = timeout_minutes
        if graph.rendering != Rendering():
            contents["rendering"] = asdict(graph.rendering)
        if graph.config.remote_code:
            contents["remote_code"] = True
        return cls(tuple(nodes), contents)

    @property
    def training(self) -> bool:
        """Whether the process trains a model."""
        return STAGES[self.nodes[0].stage].trains

    @property
    def launches(self) -> bool:
        """Whether the process runs a program that uses all devices of a training stage."""
        return STAGES[self.nodes[0].stage].launches

    @property
    def on_device(self) -> bool:
        """Whether the process uses a device where the run has some."""
        return STAGES[self.nodes[0].stage].on_device

    @property
    def micro_batch_tokens(self) -> int | None:
        """`micro_batch_tokens` of a process that trains; else None."""
        return self.contents["nodes"][0]["config"].get("micro_batch_tokens") if self.training else None

    def with_smaller_batches(self) -> "ProcessSpec | None":
        """The same process with half of `micro_batch_tokens`, which the artifact's manifest records; None if there is
        nothing to halve."""
        tokens = self.micro_batch_tokens
        if tokens is None or tokens < 2:
            return None
        (node,) = self.contents["nodes"]
        config = {**node["config"], "micro_batch_tokens": tokens // 2}
        halved = {**node, "config": config, "provenance": {**node["provenance"], "config": config}}
        return dataclasses.replace(self, contents={**self.contents, "nodes": [halved]})

    def write(self, folder: Path, servers: Mapping[str, Sequence[str]]) -> Path:
        """Write the spec file and return its path. Equal contents give the same name, so repeated runs leave one file.

        Args:
            folder: Folder of the file.
            servers: URLs of the nodes' vLLM servers, by kind. They enter the name, because concurrent runs have
                different servers.
        """
        contents = {**self.contents, "servers": servers}
        path = folder / f"spec-{stable_hash(contents if servers else self.contents)[:12]}.json"
        write_whole(path, json.dumps(contents, indent=1))
        return path


def _node_spec(graph: StageGraph, node: Node) -> dict[str, Any]:
    provenance = {
        "stage": node.stage,
        "version": STAGES[node.stage].version,
        "config": node.config,
        "ingredients": node.ingredients,
        "code": code_fingerprint(),
        "node": node.id,
    }
    return {
        "name": node.name,
        "stage": node.stage,
        "key": node.key,
        "seed": node.seed,
        "config": node.config,
        "parents": {role: graph.node(parent).key for role, parent in node.parents.items()},
        "domains": node.domains,
        "provenance": provenance,
    }
