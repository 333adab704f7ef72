"""The worker's exit codes, messages and locks."""

import errno
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from base.store.checkpoint import CorruptedArtifactError, Store
from flows.engines import worker
from stages.config.distill import DistillConfig
from stages.config.on_policy import MonitorConfig, RLConfig
from stages.learner.workspace import Workspace
from stages.rows.rendering import template_arguments
from stages.rows.trained_on import TrainedOn


def write_spec(home: Path, *keys: str, parents: dict[str, str] | None = None) -> Path:
    nodes = [
        {
            "name": f"node {key}",
            "stage": "make",
            "key": key,
            "seed": 3,
            "config": {"word": key},
            "parents": parents or {},
            "domains": {},
            "provenance": {"stage": "make"},
        }
        for key in keys
    ]
    path = home / "spec.json"
    path.write_text(json.dumps({"home": str(home), "threads": 1, "nodes": nodes}))
    return path


def make(nodes: Sequence[worker.NodeSpec], workspaces: Sequence[Workspace]) -> None:
    """A stage in small: writes its word and journals it."""
    for node, workspace in zip(nodes, workspaces, strict=True):
        workspace.journal().note(0, node["config"]["word"])
        folder = workspace.store.staging(workspace.key)
        (folder / "word.txt").write_text(node["config"]["word"])
        workspace.commit(folder, trained_on=TrainedOn(), metrics={})


def error_of(home: Path, key: str) -> dict:
    return json.loads((Store(home).work(key) / worker.ERROR_FILE).read_text())


def failing(error: Exception) -> worker.Runner:
    def run(nodes: Sequence[worker.NodeSpec], workspaces: Sequence[Workspace]) -> None:
        raise error

    return run


class WeightsWriterError(Exception):
    """Stands for an error of a library written in Rust: an exception type of its own, the cause only in words."""


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such domain"), 2),
        (CorruptedArtifactError("digest differs", "k"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 74),
        (OSError(errno.EIO, "Input/output error"), 74),
        (WeightsWriterError("I/O error: No space left on device (os error 28)"), 74),
        (chained(UserError("cannot read the base"), OSError(errno.ENOSPC, "full")), 74),
        (ConnectionResetError("peer"), 75),
        (TimeoutError("teacher"), 75),
        (chained(RuntimeError("scoring failed"), ConnectionRefusedError("server")), 75),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), 75),
        (chained(UserError("the teacher's server is not there"), ConnectionRefusedError("server")), 2),
        (FileNotFoundError(errno.ENOENT, "no such file"), 1),
        (RuntimeError("CUDA out of memory"), 71),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 71),
        (torch.AcceleratorError("CUDA error: out of memory"), 71),
        (chained(ValueError("the update failed"), torch.OutOfMemoryError("CUDA out of memory.")), 71),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), 71),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), 75),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 75),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 75),
        (RuntimeError("No CUDA GPUs are available"), 75),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), 1),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), 1),
        (ValueError("shape"), 1),
    ],
)
def test_exit_code_says_whose_fault_it_was(tmp_path, error, code):
    assert worker.run_spec(write_spec(tmp_path, "k"), failing(error)) == code
    assert error_of(tmp_path, "k") == {"type": type(error).__name__, "message": str(error), "exit_code": code}


def test_user_error_prints_its_message_and_a_crash_its_traceback(tmp_path, capfd):
    worker.run_spec(write_spec(tmp_path, "k"), failing(UserError("no domain 'srot'")))
    assert capfd.readouterr().err == "error: no domain 'srot'\n"
    worker.run_spec(write_spec(tmp_path, "k"), failing(ValueError("bad shape")))
    assert "Traceback" in (said := capfd.readouterr().err)
    assert "ValueError: bad shape" in said


def test_code_of_checkpoints_runs_only_where_the_spec_says_so(tmp_path):
    seen = []

    def looking(nodes: Sequence[worker.NodeSpec], workspaces: Sequence[Workspace]) -> None:
        seen.extend(workspace.remote_code for workspace in workspaces)

    path = write_spec(tmp_path, "k")
    assert worker.run_spec(path, looking) == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"remote_code": True}))
    assert worker.run_spec(path, looking) == 0
    assert worker.run_spec(write_spec(tmp_path, "k"), looking) == 0
    assert seen == [False, True, False]


def test_templates_are_rendered_as_the_spec_says(tmp_path):
    seen = []

    def looking(nodes: Sequence[worker.NodeSpec], workspaces: Sequence[Workspace]) -> None:
        arguments = template_arguments()
        today = arguments.pop("strftime_now", None)
        seen.append((arguments, today and today("%d %b %Y")))

    path = write_spec(tmp_path, "k")
    assert worker.run_spec(path, looking) == 0
    chosen = {"arguments": {"enable_thinking": False}, "date": "2025-02-03"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rendering": chosen}))
    assert worker.run_spec(path, looking) == 0
    assert seen == [({}, None), ({"enable_thinking": False}, "03 Feb 2025")]


def test_full_disk_still_tells_when_the_error_file_cannot_be_written(tmp_path, capfd):
    (Store(tmp_path).work("k") / worker.ERROR_FILE).mkdir()
    code = worker.run_spec(write_spec(tmp_path, "k"), failing(OSError(errno.ENOSPC, "full")))
    said = capfd.readouterr().err
    assert code == 74
    assert "full" in said
    assert "error.json could not be written" in said


@pytest.mark.parametrize(("stage", "schema"), [("rl", RLConfig), ("distill", DistillConfig)])
def test_a_stage_is_handed_a_monitor_where_one_is_asked_for(tmp_path, monkeypatch, stage, schema):
    heard = []
    monkeypatch.setattr(f"stages.{stage}.train", lambda config, workspace, *, monitor: heard.append(monitor))
    for key, chosen in (("with", MonitorConfig(every=3, examples=2)), ("without", None)):
        path = write_spec(tmp_path, key)
        spec = json.loads(path.read_text())
        sort = {"kind": "strings", "options": {"task": "sort"}}
        config = schema(monitor=chosen, max_new_tokens=9).model_dump(mode="json")
        spec["nodes"][0] |= {"stage": stage, "config": config, "domains": {"sort": sort}}
        path.write_text(json.dumps(spec))
        assert worker.run_spec(path) == 0
    monitor, absent = heard
    assert (monitor.every, monitor.sampling.max_new_tokens, list(monitor.domains)) == (3, 9, ["sort"])
    assert absent is None


def test_done_nodes_are_not_made_again(tmp_path):
    made = []

    def counting(nodes: Sequence[worker.NodeSpec], workspaces: Sequence[Workspace]) -> None:
        made.append([node["key"] for node in nodes])
        make(nodes, workspaces)

    for keys in (["b"], ["b"], ["c", "b", "a"]):
        assert worker.run_spec(write_spec(tmp_path, *keys), counting) == 0
    assert made == [["b"], ["c", "a"]]
    assert Store(tmp_path).get("a").path.joinpath("word.txt").read_text() == "a"


def test_parents_are_verified_before_use(tmp_path):
    assert worker.run_spec(write_spec(tmp_path, "parent"), make) == 0
    spec = write_spec(tmp_path, "child", parents={"start": "parent"})
    assert worker.run_spec(spec, make) == 0
    assert Store(tmp_path).get("child").manifest["parents"]["start"]["name"] == "node parent"

    (Store(tmp_path).root / "parent" / "word.txt").write_text("changed")
    spec = write_spec(tmp_path, "other", parents={"start": "parent"})
    assert worker.run_spec(spec, make) == 2
    assert "corrupted" in error_of(tmp_path, "other")["message"]


def test_a_node_that_another_run_makes_is_waited_for(tmp_path):
    store = Store(tmp_path)
    codes: list[int] = []
    spec = write_spec(tmp_path, "k")
    with store.lock("k"):
        thread = threading.Thread(target=lambda: codes.append(worker.run_spec(spec, failing(ValueError()))))
        thread.start()
        journal = store.work("k") / worker.JOURNAL_FILE
        while not journal.exists() or "\n" not in journal.read_text():
            assert thread.is_alive()
        assert "waiting for another run" in json.loads(journal.read_text())["text"]
        folder = store.staging("k")
        (folder / "word.txt").write_text("theirs")
        store.commit(folder, "k", {"name": "theirs"})
        assert codes == []
    thread.join()
    assert codes == [0]
    assert store.get("k").name == "theirs"
