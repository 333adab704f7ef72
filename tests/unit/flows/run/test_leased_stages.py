"""Which processes lease a device, and what their environment has."""

from pathlib import Path

import pytest

from flows.engines.devices import Lease
from flows.engines.launch import ALLOCATOR, allocator, own_devices
from flows.engines.process_spec import ProcessSpec
from stages.config.kinds import STAGES
from tests.unit.flows.plan.test_plan import graph_of


def test_stages_that_compute_on_the_host_hold_no_device(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, ["merge.baselines=[ties]", "evaluate.shift={}"])
    found = {}
    for node in graph.nodes:
        spec = ProcessSpec.of(graph, [node], tmp_path, 1)
        found[node.stage] = (own_devices(spec, 0), own_devices(spec, 4))
    trained = {name: (0, 4) for name, kind in STAGES.items() if kind.trains and name in found}
    assert trained and found == {
        **trained,
        "merge_weights": (0, 0),
        "cosines": (0, 0),
        "evaluate": (0, 1),
        "shift": (0, 1),
    }
    assert not STAGES["load"].on_device


def test_a_process_with_a_device_grows_its_segments_unless_the_user_set_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator() == ALLOCATOR == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert allocator() == {}


def test_devices_are_counted_by_bus() -> None:
    assert Lease(("GPU-a", "GPU-b")).environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert Lease().environment == {"CUDA_VISIBLE_DEVICES": ""}
