"""Queries `nvidia-smi`. Free of torch."""

import subprocess

SECONDS = 30


def ask(*arguments: str) -> tuple[str, str]:
    """Run `nvidia-smi`.

    Returns:
        Its output and an empty string; or an empty string and the reason of the failure, with its own message if it
        printed one.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
        )
    except FileNotFoundError:
        return "", "nvidia-smi is not installed"
    except OSError as error:
        return "", f"nvidia-smi cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer in {SECONDS} s"
    if done.returncode == 0:
        return done.stdout, ""
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    return "", f"nvidia-smi: {' '.join(lines) or f'exit code {done.returncode}'}"


def driver() -> str:
    """The driver's version, or why it is unknown."""
    answer, fault = ask("--query-gpu=driver_version", "--format=csv,noheader")
    versions = answer.split()
    if versions:
        return f"driver {versions[0]}"
    return f"driver unknown ({fault or 'nvidia-smi lists no device'})"
