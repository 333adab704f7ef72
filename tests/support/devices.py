"""Stand-ins for devices that a test's machine does not have: nvidia-smi, and a torch that counts what is leased."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

DRIVER = "580.65.06"
TWO = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-0000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-1111)"""
# `-L` lists devices, the others ask for their memory and for the driver's version.
SCRIPT = """#!/bin/sh
case "$1" in
-L) answer='{listed}';;
--query-gpu=uuid,memory.total) answer='{memory}';;
*) answer='{driver}';;
esac
echo "$answer"
exit {code}
"""
_UUID = re.compile(r"GPU \d+:.*\(UUID: ([^)]+)\)")
# Answers for `torch.cuda` as soon as it is imported. Stages go on on the CPU, for CUDA stays unavailable.
CLAIM = """
import importlib.machinery, os, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch.cuda":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.init = lambda: None
            module.is_available = lambda: False
            module.device_count = lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
            module.get_device_name = lambda device=None: "claimed"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""

# Out of memory in a backward pass, after the first saved state, with more than a number of tokens a micro-batch.
SHORT = """
import importlib.machinery, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "stages.learner.training":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            backward = module.Learner.backward

            def limited(self, loss):
                if self.config.micro_batch_tokens > {most} and any(self.progress.glob("step-*")):
                    raise module.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                backward(self, loss)

            module.Learner.backward = limited

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""


def stand_in_driver(
    folder: Path, listed: str = TWO, fails: str = "", count: int | None = None, mebibytes: int = 81559
) -> str:
    """Write an nvidia-smi that lists devices, or `count` of one kind; or fails with a message.

    Returns:
        A PATH on which it comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if count is not None:
        listed = "\n".join(f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n:04}-cccc)" for n in range(count))
    memory = "\n".join(f"{uuid}, {mebibytes}" for uuid in _UUID.findall(listed))
    answers = {"listed": listed, "memory": memory, "driver": DRIVER}
    script = SCRIPT.format(**dict.fromkeys(answers, fails) if fails else answers, code=18 if fails else 0)
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def claimed_devices(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Let every Python process count as many CUDA devices as it is shown.

    Returns:
        A PYTHONPATH that does it.
    """
    return _customised(folder, CLAIM, environment)


def short_of_memory(folder: Path, most: int, environment: Mapping[str, str] = os.environ) -> str:
    """Let stages run out of memory with more than `most` tokens a micro-batch, once a state is saved.

    Returns:
        A PYTHONPATH that does it.
    """
    return _customised(folder, SHORT.format(most=most), environment)


def _customised(folder: Path, code: str, environment: Mapping[str, str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
