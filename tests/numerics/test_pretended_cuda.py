"""Every stage on a pretended CUDA device: no operation takes tensors of two devices.

The device and what is allowed on it are `tests.vcuda.device`; docs/gpu.md lists what it cannot show.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.vcuda.cases import ON_THE_HOST, cases
from tests.vcuda.faults import FAULTS, HARMLESS

NAMES = list(cases())
# Cases that need an extra have its marker.
EXTRAS = {"harness": pytest.mark.harness, "resume-pretrain-8bit": pytest.mark.bitsandbytes}
PARAMETERS = [pytest.param(name, marks=EXTRAS.get(name, ())) for name in NAMES]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the cases that were selected report, from a process of their own: torch is patched in it."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    run = [item.callspec.params.get("name") for item in own if not item.get_closest_marker("skip")]
    names = [name for name in run if name in NAMES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.vcuda.cases", *(names or ["pretrain"])],
        cwd=request.config.rootpath,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_stage_mixes_no_devices(found: dict[str, Any], name: str) -> None:
    case = found["cases"][name]
    assert case["mixed"] == []
    assert case["error"] is None
    assert (case["operations"] == 0) == name.startswith(ON_THE_HOST)


@pytest.mark.parametrize("fault", FAULTS)
def test_mixed_devices_are_seen(found: dict[str, Any], fault: str) -> None:
    report = found["faults"][fault]
    assert report["error"] is None
    assert [line.split(" x ")[0] for line in report["mixed"]] == ["1"]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_cuda_takes_is_not_a_fault(found: dict[str, Any], harmless: str) -> None:
    report = found["harmless"][harmless]
    assert (report["error"], report["mixed"]) == (None, [])
    assert report["operations"] > 0
