"""Devices, servers and limits of a run."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stages.config.on_policy import MOST_SECONDS
from stages.config.training import StrictModel, each_once

MOST_DEVICES = 4096
# Of one device.
MOST_SERVERS = 64


class ServersConfig(StrictModel):
    """vLLM servers: given, or started by the pipeline while a stage needs them."""

    urls: list[str] = Field(
        default_factory=list, description="Servers that run already (`mopd serve`); if empty, servers are started."
    )
    gpus: int | None = Field(
        None,
        ge=0,
        le=MOST_DEVICES,
        description="Devices of each started server, 0 for the CPU; by default one if the stages train on devices.",
    )
    memory_share: float = Field(
        0.9, gt=0, lt=1, description="Share of a device's memory that the servers on it take together."
    )

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, value: list[str]) -> list[str]:
        found = [url.rstrip("/").removesuffix("/v1") for url in value]
        for url in found:
            try:
                parts = urlsplit(url)
                fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                fine = False
            if not fine:
                raise ValueError(f"{url!r} is not an address; write http://HOST:PORT")
        each_once(found)
        return found


class RolloutServersConfig(ServersConfig):
    """Servers that draw a student's completions."""

    count: int = Field(1, gt=0, le=MOST_DEVICES, description="Number of servers started for a stage.")


class TeacherServersConfig(ServersConfig):
    """Servers that score with a merge's teachers: one for each full checkpoint, together with the adapters of it."""

    per_device: Annotated[int, Field(ge=1, le=MOST_SERVERS)] | None = Field(
        None,
        description="Most servers on one device, or on the same `gpus` devices; they are spread by size and start one "
        "after another. By default one, or more where the machine has too few devices.",
    )


class ResourcesConfig(StrictModel):
    """The resources of the run. Only the number of devices of a stage and its sampler enter content keys."""

    gpus: int = Field(0, ge=0, le=MOST_DEVICES, description="Devices of each training stage; 0 trains on the CPU.")
    parallel_experts: int = Field(2, ge=1, le=MOST_DEVICES, description="Nodes that run side by side.")
    sampler: Literal["transformers", "vllm", "vllm_server"] = Field(
        "transformers", description="The sampler of RL and merge, unless a stage sets its own `sampler`."
    )
    rollout_servers: RolloutServersConfig = Field(
        default_factory=RolloutServersConfig, description="vLLM servers of the sampler `vllm_server`."
    )
    teacher_servers: TeacherServersConfig = Field(
        default_factory=TeacherServersConfig, description="vLLM servers of `merge.teacher_backend: vllm_server`."
    )
    threads: Annotated[int, Field(ge=1, le=MOST_DEVICES)] | Literal["auto"] = Field(
        "auto",
        description="CPU threads of each node's process; `auto` gives all cores to a training stage that no other can "
        "run beside, and an equal share to each of the others.",
    )
    timeout_minutes: float = Field(
        120,
        gt=0,
        le=MOST_SECONDS / 60,
        description="A node that reports no step, score or note for longer is ended and tried again.",
    )
    retries: int = Field(2, ge=0, le=1000, description="New attempts after an infrastructure fault.")
