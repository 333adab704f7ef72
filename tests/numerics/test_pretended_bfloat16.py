"""What stages with `dtype: bfloat16` do on a pretended CUDA device: number types, masks, synchronisations.

The tables of docs/gpu.md come from the same counts: `python -m tests.vcuda.cases --counts NAME …`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

NARROW = [
    "pretrain-bf16",
    "sft-bf16",
    "sft-bf16-lora",
    "rl-bf16",
    "rl-bf16-kl-lora",
    "distill-bf16",
    "evaluate-bf16",
    "evaluate-bf16-adapter",
    "shift-bf16",
]
# Rows of several lengths in shared lines: with masks in float32, without in bfloat16.
PACKED, NARROW_PACKED = "sft-packed", "sft-packed-bf16"
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The counts of all cases here, from a process of their own: torch is patched in it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vcuda.cases", "--counts", *NARROW, PACKED, NARROW_PACKED],
        cwd=request.config.rootpath,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["cases"]


@pytest.mark.parametrize("name", [*NARROW, NARROW_PACKED])
def test_products_are_in_bfloat16(found: dict[str, Any], name: str) -> None:
    assert found[name]["error"] is None
    work: dict[str, Counter[str]] = {}
    for phase, dtype, _, _, operations in found[name]["products"]:
        work.setdefault(phase, Counter())[dtype] += operations
    assert work
    for phase, by_type in work.items():
        assert by_type["bfloat16"] >= 0.99 * by_type.total(), (phase, by_type)


@pytest.mark.parametrize("name", [*NARROW, PACKED, NARROW_PACKED])
def test_no_mask_is_made_on_the_host(found: dict[str, Any], name: str) -> None:
    assert "cpu" not in dict(found[name]["masks"])


def test_packed_rows_need_no_mask_in_bfloat16(found: dict[str, Any]) -> None:
    assert dict(found[PACKED]["masks"])["cuda"] > 0
    assert found[NARROW_PACKED]["masks"] == []


def waits(case: dict[str, Any], phase: str) -> int:
    """Synchronisations in a part of a step."""
    return sum(count for own, _, _, count in case["synchronisations"] if own == phase)


@pytest.mark.parametrize("name", ["pretrain-bf16", "sft-bf16", "sft-bf16-lora"])
def test_a_micro_batch_waits_no_more_than_it_copies(found: dict[str, Any], name: str) -> None:
    # Tokens, scored positions, bounds, weights and the loss read once; a copy of the targets for each chunk.
    assert 0 < waits(found[name], "update") <= 10


@pytest.mark.parametrize("name", ["rl-bf16", "distill-bf16", "evaluate-bf16"])
def test_decoding_waits_once_a_token_and_four_times_where_rows_end(found: dict[str, Any], name: str) -> None:
    kinds = Counter[str]()
    for phase, kind, _, count in found[name]["synchronisations"]:
        if phase == "decode":
            kinds[kind] += count
    # An evaluation draws a greedy batch and a sampled one. The device counts a truth value as two reads.
    batches = 2 if name.startswith("evaluate") else 1
    reads = kinds.pop("aten::is_nonzero")
    assert 0 < reads <= 2 * NEW_TOKENS * batches
    assert kinds.total() <= 4 * NEW_TOKENS * batches
    assert kinds["aten::item"] <= NEW_TOKENS * batches - 1


def test_an_update_moves_tokens_and_neither_masks_nor_logits(found: dict[str, Any]) -> None:
    case = found[NARROW_PACKED]
    moved = sum(count for phase, _, count in case["moved"] if phase == "update")
    largest = {(phase, device): size for phase, device, size, *_ in case["largest"]}
    tokens = largest["update", "cpu"]
    assert 0 < moved <= 3 * tokens
    assert largest["update", "cuda"] > tokens
