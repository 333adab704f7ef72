"""Real vLLM in each of two processes that train together, as whole copies (DDP) and as shards (FSDP2), over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import vllm_processes
from tests.support.vllm_processes import SETTINGS, STEPS

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4
PROMPTS = 5
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write that run all cases one after another."""
    home = tmp_path_factory.mktemp("home")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(vllm_processes.__file__)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(home), ",".join(SETTINGS)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.fixture(params=SETTINGS)
def facts(request: pytest.FixtureRequest, home: Path) -> tuple[str, list[dict]]:
    """A case, and what each of its processes saw."""
    case = request.param
    return case, [json.loads((home / f"{case}-{rank}.json").read_text()) for rank in range(2)]


def test_every_engine_follows_the_student(facts):
    case, (first, second) = facts
    limit = 0.25 if "narrow" in case else TOLERANCE
    assert len(first["metrics"]) == STEPS
    for values in first["metrics"]:
        # Over the rows of both processes, in the trainer's own forward pass.
        assert 0 < values["distill/mismatch"] <= values["distill/mismatch_max"] < limit
        assert values["distill/grad_norm"] > 0
    before, after = first["notes"]
    assert before.startswith("preflight: sampler and trainer agree within")
    assert after.startswith("preflight after the first update: sampler and trainer agree within")
    # Each draws its own part of a step's prompts, and both the preflight's.
    assert [len(seen["drawn"]) for seen in (first, second)] == [2 * 2 + STEPS * 3, 2 * 2 + STEPS * 2]
    assert first["drawn"][:2] == second["drawn"][:2]


def test_an_engine_is_made_for_its_process_s_rows_and_number_type(facts):
    case, seen = facts
    for each in seen:
        assert each["settings"] == {
            "executor": "external_launcher",
            "context": 128,
            "rows": -(-PROMPTS // 2) * 4,
            "dtype": "torch.bfloat16" if "narrow" in case else "torch.float32",
        }
    assert "engine-0" not in seen[0]["left"] and "engine-1" not in seen[1]["left"]


def test_shards_are_gathered_tensor_by_tensor(facts):
    case, seen = facts
    for each in seen:
        if "shards" not in case:
            assert (each["gathered"], each["whole"]) == (0, [])
            continue
        # As a whole for the preflight and its repetition alone.
        assert each["gathered"] == 2
        # The preflight hands over what is gathered there; in the step with the repetition it is gathered too.
        handed = 0 if "lora" in case else STEPS - 1
        assert len(each["whole"]) == handed and len(set(each["whole"])) == min(1, handed)
        assert each["kinds"] == ([] if handed == 0 else ["torch.bfloat16" if "narrow" in case else "torch.float32"])
