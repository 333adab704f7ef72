"""`benchmarks/gpu_merge.py` at its tiny size: on a CPU, and its parts on the pretended CUDA device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vcuda.gpu_merge_parts import NAMES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    done = run(["-m", "tests.vcuda.gpu_merge_parts"], request.config.rootpath)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_mixes_no_devices(parts: dict[str, Any], name: str) -> None:
    assert (parts[name]["error"], parts[name]["mixed"]) == (None, [])
    assert parts[name]["operations"] > 0


def test_phases_are_measured_on_the_device(parts: dict[str, Any]) -> None:
    phases = parts["merge"]["figures"]["phases"]
    assert list(phases) == ["rollout", "signal", "update"]
    # Weights and moments in float32 stay on the device.
    weights = 3 * 4 * parts["prepare"]["figures"]["parameters"]
    assert all(phase["peak_bytes"] > weights and phase["seconds"] > 0 for phase in phases.values())
    assert all(phases[name]["planned_bytes"] > weights for name in ("rollout", "update"))
    assert phases["update"]["operations_a_second"] > 0
    assert parts["trace"]["figures"]["kernels"]
    assert set(parts["sampler"]["figures"]["ratios"]) == {"generate", "generate without log-probabilities"}


def test_it_runs_on_a_cpu(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    unlimited = ["--patience", "100", "--minutes", "1000"]
    command = [str(BENCHMARKS / "gpu_merge.py"), "--tiny", "--parts", "merge", "--out", str(tmp_path), *unlimited]
    done = run(command, pytestconfig.rootpath)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepare done, merge done" in done.stdout
    written = json.loads((tmp_path / "gpu_merge.json").read_text())
    merge, settings = written["parts"]["merge"], written["settings"]
    assert merge["completions"] == settings["prompts"] * settings["group"]
    for name, phase in merge["phases"].items():
        assert phase["tokens_a_second"] == pytest.approx(phase["tokens"] / phase["seconds"]), name
    assert 0 < merge["phases"]["rollout"]["tokens"] <= merge["completions"] * settings["new_tokens"]
    assert len(merge["recorded"]) == settings["steps"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_merge.json", "gpu_merge.log"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_merge

    return gpu_merge


@pytest.fixture
def arguments(script: Any, tmp_path: Path) -> Any:
    words = ["--tiny", "--out", str(tmp_path), "--home", str(tmp_path / "home")]
    parsed = script.parse(words)
    parsed.words = words
    return parsed


def test_a_part_is_ended_at_its_limit(script: Any, arguments: Any) -> None:
    report = script.run_apart(arguments, "merge", 0)
    assert report["status"] == "ran out of time"
    assert "gpu_merge.log" in report["reason"]


def test_the_others_run_after_a_part_that_fails(
    script: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def part(_: Any, name: str, seconds: float) -> dict[str, Any]:
        asked.append(name)
        assert 0 < seconds <= script.LIMITS[name]
        return (
            {"status": "failed", "seconds": 1.0, "reason": "no"}
            if name == "merge"
            else {"status": "done", "seconds": 1.0}
        )

    monkeypatch.setattr(script, "run_apart", part)
    assert script.run_all(arguments) == 1
    assert asked == list(script.PARTS)
    assert "merge failed, trace done" in capsys.readouterr().out
    arguments.minutes = 0
    assert script.run_all(arguments) == 0
    assert "too little is left of --minutes 0" in capsys.readouterr().out


def test_a_part_without_its_library_is_left_out(script: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    setup = script.Setup.of(arguments)
    for name in ("trl", "merge_vllm", "merge_servers"):
        assert script.run_here(setup, name) == script.CANNOT
        assert "not installed" in json.loads(script.file_of(setup.out, name).read_text())["reason"]


def test_a_model_that_is_not_there_is_named(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "models" / "none"
    assert script.main(["--model", str(missing), "--out", str(tmp_path / "out")]) == 2
    assert f"{missing}: no such directory" in capsys.readouterr().err
    assert script.main(["--model", str(missing.with_suffix(".gguf")), "--out", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
