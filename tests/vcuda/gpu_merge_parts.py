"""The parts of `benchmarks/gpu_merge.py` that need no further library, at the tiny size on the pretended device.

    python -m tests.vcuda.gpu_merge_parts

prints a JSON object: part -> what `tests.vcuda.cases.examine` reports, and the part's figures. A process of its own:
torch is patched.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from tests.vcuda.cases import examine
from tests.vcuda.device import pretend

NAMES = ("prepare", "card", "merge", "trace", "sampler")


def main() -> int:
    """Run the parts and print."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    torch.set_num_threads(1)
    pretend()
    # As in a process that has one device.
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    from gpu_merge import parse
    from gpu_parts import PARTS
    from gpu_setup import Setup

    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        setup = Setup.of(parse(["--tiny", "--home", f"{folder}/home", "--out", folder, "--threads", "1"]))
        for name in NAMES:
            AcceleratorState._reset_state(reset_partial_state=True)
            figures: dict = {}
            report = examine(lambda name=name, figures=figures: figures.update(PARTS[name](setup)))
            found[name] = report | {"figures": figures}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
