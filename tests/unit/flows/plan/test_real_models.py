"""The run files of real models, checked on their shapes alone: stand-ins for devices, and a config without weights."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from typer.testing import CliRunner

from flows.cli.app import app
from flows.engines import gpus
from flows.engines.devices import host_devices
from stages.model.tiny import character_tokenizer
from studies.sizes import qwen3_8b
from tests.support.devices import stand_in_driver
from tests.support.installed import install_vllm

pytestmark = pytest.mark.slow

RUNS = Path(__file__).parents[4] / "flows" / "runs"
COMMIT = "b968826d9c46dd6066d109eabc6255188de91218"
Check = Callable[..., str]


def few_examples(name: str) -> list[str]:
    """Overrides with which the check draws few examples; the number changes neither shapes nor memory."""
    raw = yaml.safe_load((RUNS / name).read_text())
    experts = [f"experts.{e}.train.{method}" for e, given in raw["experts"].items() for method in given["train"]]
    return [*(f"{stage}.examples=200" for stage in ["cold_start.sft", "merge", *experts]), "evaluate.examples=50"]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """`mopd plan --check` of a shipped file; returns the output, with its exit code at the end."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--Qwen--Qwen3-8B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "models--Qwen--Qwen3-8B" / "refs").mkdir()
    (cache / "models--Qwen--Qwen3-8B" / "refs" / "main").write_text(COMMIT)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(snapshot)
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}thinking{% endif %}"
    (snapshot / "chat_template.jinja").write_text(template)
    (snapshot / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    qwen3_8b().save_pretrained(snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch", tuple(host_devices())))
    install_vllm(monkeypatch, "vllm")

    def run(name: str, devices: int, *arguments: str, mebibytes: int = 81559) -> str:
        monkeypatch.setenv(
            "PATH", stand_in_driver(tmp_path / f"driver-{mebibytes}", count=devices, mebibytes=mebibytes)
        )
        asked = ["plan", str(RUNS / name), *few_examples(name), "--check", "--home", str(tmp_path / "home"), *arguments]
        done = CliRunner().invoke(app, asked)
        return f"{done.output}\nexit code {done.exit_code}"

    return run


@pytest.mark.parametrize(("name", "devices"), [("qwen3_8b_lora.yaml", 1), ("qwen3_8b.yaml", 8), ("smollm2.yaml", 1)])
def test_a_real_models_run_passes_on_cards_of_80_gb(check: Check, name: str, devices: int) -> None:
    output = check(name, devices)
    assert output.endswith("exit code 0"), output
    assert "check passed" in output and "memory: student@0: about " in output
    assert "is the lab's" not in output


def test_on_a_smaller_card_it_is_refused_with_a_way_around(check: Check) -> None:
    output = check("qwen3_8b_lora.yaml", 1, mebibytes=24564)
    assert output.endswith("exit code 2")
    assert "a GPU has 24.0 GiB: lower " in output and "--ignore-memory runs it all the same" in output
    output = check("qwen3_8b_lora.yaml", 1, "--ignore-memory", mebibytes=24564)
    assert output.endswith("exit code 0"), output
    assert "warning: student@0: about " in output


def test_fewer_devices_than_asked_for_are_named(check: Check) -> None:
    assert "the stage and its vLLM servers need at least 8 devices, but this machine has 6" in check("qwen3_8b.yaml", 6)


def test_the_labs_rates_on_a_real_model_are_a_warning(check: Check) -> None:
    output = check("qwen3_8b_lora.yaml", 1, "merge.optimizer={}", "experts.letters.train.rl.optimizer={}")
    assert output.endswith("exit code 0"), output
    for key, rate in (("merge", 0.001), ("experts.letters.train.rl", 0.0005)):
        assert f"warning: {key}.optimizer.learning_rate: {rate} is the lab's" in output
    assert "this one has 8,191 million" in output
    assert "experts.arithmetic.train.rl.optimizer.learning_rate" not in output


def test_the_labs_rates_are_no_warning_on_its_own_models(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(RUNS / "smoke.yaml"), "--check", "--home", str(tmp_path)])
    assert done.exit_code == 0 and "is the lab's" not in done.output, done.output
