"""Stand-ins for devices that a test's machine does not have: nvidia-smi, and a torch that counts what is leased."""

import os
from collections.abc import Mapping
from pathlib import Path

DRIVER = "580.65.06"
TWO = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-0000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb-1111)"""
# `-L` lists devices, any other question is for the driver's version.
SCRIPT = """#!/bin/sh
if [ "$1" = -L ]; then answer='{listed}'; else answer='{driver}'; fi
echo "$answer"
exit {code}
"""
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


def stand_in_driver(folder: Path, listed: str = TWO, fails: str = "") -> str:
    """Write an nvidia-smi that lists devices, or fails with a message.

    Returns:
        A PATH on which it comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = SCRIPT.format(listed=fails or listed, driver=fails or DRIVER, code=18 if fails else 0)
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def claimed_devices(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Let every Python process count as many CUDA devices as it is shown.

    Returns:
        A PYTHONPATH that does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLAIM)
    return os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
