"""Entry point of a node process: one training node, or several evaluations of one checkpoint. Free of Prefect.

`python -m flows.engines.worker SPEC.json`. The launcher writes the spec of the nodes. The results are an artifact in
the store, a journal, and an exit code that classifies a failure. Under torchrun every rank runs the stage; only rank 0
takes the lock and broadcasts whether there is work.
"""

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from base.errors import InfrastructureError, UserError, is_unreachable
from base.processes import die_with_parent
from base.store.checkpoint import Artifact, Store, write_whole
from base.store.journal import JOURNAL_FILE, append_note
from experts.loading import load_domain
from flows.engines.preload import LIBRARIES, preload
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig
from stages.learner.workspace import Workspace
from stages.rows.rendering import Rendering, rendering

if TYPE_CHECKING:
    from evals.measure.monitor import Monitor

DONE, FAILED, USER_ERROR, OUT_OF_MEMORY, DISK_FAULT, INFRASTRUCTURE_FAULT = 0, 1, 2, 71, 74, 75
ERROR_FILE = "error.json"

NodeSpec = Mapping[str, Any]
Runner = Callable[[Sequence[NodeSpec], Sequence[Workspace]], None]

_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
# Messages of the Rust and C++ writers of weights, which carry no errno.
_DISK_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")
_INFRASTRUCTURE_TYPES = {
    "torch.distributed.DistBackendError",
    "torch.distributed.DistNetworkError",
    "torch.distributed.DistStoreError",
    # CUDA's own errors: a device that fell off the bus, an uncorrectable ECC error, an illegal access.
    "torch.AcceleratorError",
}
# Errors of CUDA that a new attempt meets again: a bug in a kernel's arguments, a build for other devices.
_REPEATED_TEXTS = ("device-side assert", "no kernel image", "invalid configuration argument", "invalid argument")
_LOST_DEVICE_TEXTS = ("NCCL error", "uncorrectable ECC error", "illegal memory access", "No CUDA GPUs are available")
# Of allocators that raise no torch.OutOfMemoryError: CUDA's and cuBLAS's own, and the host's.
_OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def _monitor(config: OnPolicyConfig, workspace: Workspace) -> "Monitor | None":
    """The monitor that scores the student during training; built here because stages do not import evals."""
    if config.monitor is None:
        return None
    from evals.measure.monitor import Monitor

    return Monitor(workspace.domains, config.monitor, config.max_new_tokens, config.stop)


def run_stage(nodes: Sequence[NodeSpec], workspaces: Sequence[Workspace]) -> None:
    """Run nodes of one stage in this process, several only of a stage whose nodes run together."""
    kind = STAGES[nodes[0]["stage"]]
    if kind.together:
        kind.function()([node["config"] for node in nodes], workspaces)
        return
    (node,), (workspace,) = nodes, workspaces
    config = kind.config(**node["config"])
    if kind.samples:
        kind.function()(config, workspace, monitor=_monitor(config, workspace))
    else:
        kind.function()(config, workspace)


def run_spec(path: Path, run: Runner = run_stage) -> int:
    """Run the nodes of a spec.

    Args:
        path: The spec file, as written by `flows.engines.launch`.
        run: The function that runs nodes of one stage.

    Returns:
        The exit code: 0 done, 2 a user's mistake, 71 out of memory, 74 a full or failing disk, 75 an infrastructure
        fault that is worth a new attempt, 1 anything else. A failure leaves `error.json` in the work folder of each
        node and, unless it is a user's mistake, a traceback on stderr.
    """
    spec = json.loads(path.read_text())
    store = Store(Path(spec["home"]))
    nodes: list[NodeSpec] = spec["nodes"]
    try:
        with rendering(Rendering(**spec.get("rendering", {}))):
            _run(nodes, store, spec, run)
    except Exception as error:  # noqa: BLE001 - the border of the process: every failure becomes an exit code
        code = exit_code_of(error)
        if code == USER_ERROR:
            sys.stderr.write(f"error: {error}\n")
        else:
            traceback.print_exc()
        _write_errors(store, nodes, error, code)
        return code
    return DONE


def exit_code_of(error: BaseException) -> int:
    """The exit code that classifies an exception. A disk fault takes precedence anywhere in the chain of causes."""
    causes = list(_causes(error))
    if any(_is_disk_fault(cause) for cause in causes):
        return DISK_FAULT
    if isinstance(error, UserError):
        return USER_ERROR
    if any(_is_out_of_memory(cause) for cause in causes):
        return OUT_OF_MEMORY
    if any(_is_infrastructure_fault(cause) for cause in causes):
        return INFRASTRUCTURE_FAULT
    return FAILED


def _run(
    nodes: Sequence[NodeSpec],
    store: Store,
    spec: Mapping[str, Any],
    run: Runner,
) -> None:
    from stages.learner.ranks import agree, collectives_limited, use_threads

    use_threads(int(spec["threads"]))
    minutes = spec.get("timeout_minutes")
    with contextlib.ExitStack() as held:
        waiting: list[str] = agree(lambda: _lock_unmade(nodes, store, held))
        missing = [node for node in nodes if node["key"] in waiting]
        if not missing:
            return
        # Evaluations of one checkpoint share it, so it is verified once.
        parents = {key: store.get(key) for node in missing for key in node["parents"].values()}
        servers = spec.get("servers", {})
        held.enter_context(collectives_limited(None if minutes is None else timedelta(minutes=minutes)))
        remote_code = bool(spec.get("remote_code"))
        run(missing, [_workspace(node, store, parents, servers, remote_code) for node in missing])


def _lock_unmade(nodes: Sequence[NodeSpec], store: Store, held: contextlib.ExitStack) -> list[str]:
    """Lock every node and return the keys of those that are unmade.

    The locks are taken in the order of the keys, so that two runs cannot wait for each other.
    """
    for key in sorted(node["key"] for node in nodes):
        lock = store.lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            append_note(store.work(key) / JOURNAL_FILE, 0, "waiting for another run that makes this node")
            lock.acquire()
        held.callback(lock.release)
    return [node["key"] for node in nodes if store.find(node["key"]) is None]


def _workspace(
    node: NodeSpec,
    store: Store,
    parents: Mapping[str, Artifact],
    servers: Mapping[str, Sequence[str]],
    remote_code: bool,
) -> Workspace:
    return Workspace(
        store=store,
        key=node["key"],
        name=node["name"],
        seed=node["seed"],
        parents={role: parents[key] for role, key in node["parents"].items()},
        domains={name: load_domain(name, d["kind"], d["options"]) for name, d in node["domains"].items()},
        provenance=node["provenance"],
        servers=servers,
        remote_code=remote_code,
    )


def _write_errors(store: Store, nodes: Sequence[NodeSpec], error: Exception, code: int) -> None:
    """Write the message for the supervisor. With several ranks the first to fail has the cause and is kept."""
    message = str(error) or type(error).__name__
    text = json.dumps({"type": type(error).__name__, "message": message, "exit_code": code})
    try:
        for node in nodes:
            path = store.work(node["key"]) / ERROR_FILE
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and path.exists():
                continue
            write_whole(path, text)
    except OSError as fault:
        sys.stderr.write(f"{ERROR_FILE} could not be written: {fault}\n")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_disk_fault(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return True
    return any(text in str(error) for text in _DISK_TEXTS)


def _is_out_of_memory(error: BaseException) -> bool:
    return "torch.OutOfMemoryError" in _kinds(error) or any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def _is_infrastructure_fault(error: BaseException) -> bool:
    if isinstance(error, InfrastructureError):
        return True
    text = str(error)
    if any(each in text for each in _REPEATED_TEXTS):
        return False
    lost = any(each in text for each in _LOST_DEVICE_TEXTS)
    return lost or is_unreachable(error) or not _kinds(error).isdisjoint(_INFRASTRUCTURE_TYPES)


def _kinds(error: BaseException) -> set[str]:
    """Full names of an exception's types. By name, because this module imports no torch."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def main(arguments: Sequence[str]) -> int:
    """Run the spec named on the command line."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m flows.engines.worker SPEC.json\n")
        return USER_ERROR
    # torchrun gives each worker its own session, which a signal to torchrun's process group does not reach.
    die_with_parent(os.getppid())
    preload(LIBRARIES)
    return run_spec(Path(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
