"""The parts of `gpu_merge.py`: each is a function of the setup that returns its figures and prints them."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_meter import PHASES, Step, Trace, median_of, metered
from gpu_setup import EXPERTS, Setup, base_and_experts, make, named, plan, planned, shape
from transformers import AutoModelForCausalLM, AutoTokenizer

from base.errors import UserError
from base.extras import require_vllm
from base.store.energy import VISIBLE
from experts.loading import load_domain
from flows.engines.devices import Lease
from flows.engines.fork_client import ForkServer, child_environment
from flows.engines.memory import CONTEXT_BYTES, Need
from flows.engines.vllm_commands import TEACHERS, on_policy_config, teacher_servers
from flows.engines.vllm_servers import VllmServers
from flows.engines.worker import run_stage
from flows.plan.nodes import StageGraph
from flows.run_file.schema import STUDENT
from flows.servers.access import server_key
from stages.config.distill import DistillConfig
from stages.config.on_policy import SamplerConfig
from stages.model.policy import Policy, load_policy
from stages.vllm.settings import KEY_VARIABLE
from studies import gpu_work

# Side of the square matrices whose product is the measured peak: on a GPU, on a CPU, at the tiny size; products timed.
SIDE, CPU_SIDE, TINY_SIDE, PRODUCTS = 8192, 1024, 256, 30
# vLLM's share of the device: of the engine in the trainer's process, and of each teachers' server beside it.
ENGINE_SHARE, SERVER_SHARE = 0.3, 0.15
TEACHER_TOP_K = 20
# Completion tokens of the step that is profiled: every token of a rollout is thousands of events.
TRACED_TOKENS = 24
GIB = 2**30
Figures = dict[str, Any]


class LeftOut(Exception):
    """A part cannot run here; the message has the reason."""


def prepare(setup: Setup) -> Figures:
    """Import the base and make the experts."""
    base, experts = base_and_experts(setup)
    parameters = int(base.manifest["parameters"])
    kind = "adapters" if setup.lora else "full checkpoints"
    print(f"base of {parameters:,} parameters; {len(experts)} experts, {kind}")
    return {"parameters": parameters, "experts": len(experts)}


def card(setup: Setup) -> Figures:
    """The peak of bfloat16 products, measured and of the data sheet, and the bandwidth of memory."""
    device = "cuda" if setup.gpus else "cpu"
    name = torch.cuda.get_device_name(0) if setup.gpus else "cpu"
    side = (SIDE if setup.gpus else CPU_SIDE) if setup.model else TINY_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(lambda: left @ right)
    moved = torch.randn(side * side * 4, device=device)
    kept = torch.empty_like(moved)
    copy = _seconds(lambda: kept.copy_(moved))
    sheet = gpu_work.data_sheet(name)
    found = {
        "device": name,
        "side": side,
        "measured": 2 * side**3 / product,
        "data_sheet": sheet,
        "bandwidth": 2 * moved.nbytes / copy,
    }
    shown = f"{sheet / 1e12:.0f} by its data sheet" if sheet else "its data sheet is not in the table"
    print(
        f"{name}: {found['measured'] / 1e12:.3g} TFLOPS in bfloat16 ({side} x {side} x {side}, random factors), "
        f"{shown}; {found['bandwidth'] / 1e9:.0f} GB/s read and written"
    )
    return found


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of the times of a call, each waited for: what other work on the machine adds is no part of it."""
    times = []
    for _ in range(PRODUCTS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def merge(setup: Setup) -> Figures:
    """The merge with local teachers and the sampler of the trainer's own model."""
    base_and_experts(setup)
    return _merge(setup, plan(setup))


def trace(setup: Setup) -> Figures:
    """The last step of a short merge under torch's profiler."""
    base_and_experts(setup)
    tokens = min(TRACED_TOKENS, setup.new_tokens - 1)
    profile = Trace(2, setup.out)
    with metered(profile):
        make(setup, plan(setup, [f"merge.max_new_tokens={tokens}", "merge.max_steps=2"]), STUDENT)
    print(f"a step of {tokens} new tokens; the dearest kernels, all in {setup.out}/kernels.txt and trace.json.gz:")
    for name, calls, seconds in profile.rows[:12]:
        print(f"  {seconds * 1e3:9.2f} ms {calls:6d} x  {name[:90]}")
    return {"tokens": tokens, "kernels": [list(row) for row in profile.rows]}


def merge_vllm(setup: Setup) -> Figures:
    """The merge with rollouts by vLLM in the trainer's process and local teachers."""
    _require_vllm(setup)
    base_and_experts(setup)
    return _merge(setup, plan(setup, ["resources.sampler=vllm", f"merge.sampler.memory_share={ENGINE_SHARE}"]))


def merge_servers(setup: Setup) -> Figures:
    """The merge with rollouts by vLLM in the trainer's process and teachers on vLLM servers of the same device."""
    _require_vllm(setup)
    _, experts = base_and_experts(setup)
    top_k = f"{{type: reverse_kl, top_k: {{k: {TEACHER_TOP_K}}}}}"
    graph = plan(
        setup,
        [
            "resources.sampler=vllm",
            f"resources.teacher_servers.memory_share={SERVER_SHARE}",
            f"merge.sampler.memory_share={ENGINE_SHARE}",
            "merge.teacher_backend=vllm_server",
            f"merge.objective={top_k}",
        ],
    )
    config = on_policy_config(named(graph, STUDENT))
    assert isinstance(config, DistillConfig)
    commands = teacher_servers(config, experts, setup.store, graph.config.resources)
    with _standing(setup, commands) as urls:
        return _merge(setup, graph, {TEACHERS: urls})


@contextlib.contextmanager
def _standing(setup: Setup, commands: Sequence[Any]) -> Iterator[list[str]]:
    """Servers that answer, at their URLs; all are on this process's own device."""
    os.environ[KEY_VARIABLE] = server_key(setup.home)
    server = ForkServer(setup.home / "servers.log", child_environment(setup.threads), preload=())
    device = os.environ.get(VISIBLE, "0").split(",")[0]
    lease = Lease((device,) * len(commands) if setup.gpus else ())
    started = time.perf_counter()
    try:
        with VllmServers(commands, setup.home, lease=lease, report=print) as servers:
            servers.start(server)
            while not servers.ready():
                servers.tend()
                time.sleep(0.5)
            print(f"{len(commands)} servers answer after {time.perf_counter() - started:.0f} s")
            yield servers.urls[TEACHERS]
    finally:
        server.close()


def _require_vllm(setup: Setup) -> None:
    try:
        require_vllm("vLLM", setup.gpus)
    except UserError as error:
        raise LeftOut(str(error)) from None


def _merge(setup: Setup, graph: StageGraph, servers: dict[str, list[str]] | None = None) -> Figures:
    """Make the student and report its steps; the first warms up."""
    need = planned(setup, graph)
    started = time.perf_counter()
    with metered() as steps:
        make(setup, graph, STUDENT, servers, run_stage)
    seconds = time.perf_counter() - started
    figures = _figures(setup, graph, steps[1:], need)
    _print_merge(setup, figures, seconds)
    return {**figures, "seconds_with_start": seconds, "recorded": [_recorded(step) for step in steps]}


def _figures(setup: Setup, graph: StageGraph, steps: Sequence[Step], need: Need) -> Figures:
    """Medians over the steps by phase."""
    config = on_policy_config(named(graph, STUDENT))
    assert isinstance(config, DistillConfig)
    sizes, local = shape(setup, graph), config.teacher_backend == "local"
    # Completion tokens are sampled; whole rows run through teachers and student.
    tokens = {
        "rollout": lambda step: step.rows.scored,
        "signal": lambda step: step.rows.tokens,
        "update": lambda step: step.rows.tokens,
    }
    work = {
        "signal": lambda step: gpu_work.score(sizes, step.rows) if local else 0.0,
        "update": lambda step: gpu_work.update(
            sizes, step.rows, adapters=bool(setup.lora), recomputed=config.gradient_checkpointing,
            teacher_heads=int(local),
        ),
    }  # fmt: skip
    context = CONTEXT_BYTES if setup.gpus else 0
    phases: dict[str, Figures] = {}
    for name in PHASES:
        parts = need.phases.get(name)
        phases[name] = {
            "seconds": median_of(steps, lambda step, name=name: step.seconds[name]),
            "tokens": median_of(steps, tokens[name]),
            "tokens_a_second": median_of(steps, lambda step, name=name: tokens[name](step) / step.seconds[name]),
            "peak_bytes": max(step.allocated[name] for step in steps),
            "used_bytes": max(step.used[name] for step in steps),
            # The CUDA context is no tensor.
            "planned_bytes": sum(parts.values()) - context if parts else None,
            "planned": parts,
        }
        if name in work:
            phases[name]["operations_a_second"] = median_of(
                steps, lambda step, name=name: work[name](step) / step.seconds[name]
            )
    return {"completions": steps[0].completions, "phases": phases, "peak": peak_of(setup)}


def peak_of(setup: Setup) -> Figures:
    """The figures of the part `card`; measured now if it has not run."""
    file = file_of(setup.out, "card")
    found: Figures = json.loads(file.read_text()) if file.exists() else card(setup)
    return {name: found[name] for name in ("measured", "data_sheet")}


def _print_merge(setup: Setup, figures: Figures, seconds: float) -> None:
    print(
        f"{figures['completions']} completions a step of at most {setup.new_tokens} tokens, {len(EXPERTS)} teachers, "
        f"bfloat16; {seconds:.1f} s with start and end of the stage; median of {setup.steps - 1} steps"
    )
    print("  phase      s/step     tokens   tokens/s  peak GiB  plan GiB  device GiB")
    for name, phase in figures["phases"].items():
        # The plan has no phase of the teachers' own.
        planned_gib = f"{phase['planned_bytes'] / GIB:.2f}" if phase["planned_bytes"] else "-"
        print(
            f"  {name:8s} {phase['seconds']:8.3f} {phase['tokens']:10,.0f} {phase['tokens_a_second']:10,.0f} "
            f"{phase['peak_bytes'] / GIB:9.2f} {planned_gib:>9s} "
            f"{phase['used_bytes'] / GIB:11.2f}"
        )
    reached, peak = figures["phases"]["update"]["operations_a_second"], figures["peak"]
    sheet = f", {reached / peak['data_sheet']:.1%} of the data sheet's" if peak["data_sheet"] else ""
    print(f"  update: {reached / 1e12:.3g} TFLOPS, {reached / peak['measured']:.1%} of the measured peak{sheet}")


def _recorded(step: Step) -> Figures:
    return {
        "completions": step.completions, "tokens": step.rows.tokens, "sampled": step.rows.scored,
        "seconds": step.seconds, "peak_bytes": step.allocated, "used_bytes": step.used,
    }  # fmt: skip


def sampler(setup: Setup) -> Figures:
    """The sampler of a merge in full beside transformers' `generate` with and without log-probabilities, and vLLM."""
    import rollout

    base, _ = base_and_experts(setup)
    device = "cuda" if setup.gpus else "cpu"
    policy = load_policy(base, setup.store, trainable=True)
    policy.model.to(device)
    policy.compute_in("bfloat16")
    # Transformers' users load the weights in the type they compute in.
    model = AutoModelForCausalLM.from_pretrained(base.uri, dtype=torch.bfloat16).to(device).eval()
    theirs = Policy(model, AutoTokenizer.from_pretrained(base.uri))
    domains = plan(setup).config.domains
    prompts = rollout.draw_prompts(
        policy, [load_domain(n, d.kind, d.options) for n, d in domains.items()], setup.prompts
    )
    sides: dict[str, rollout.Side] = {
        "ours": partial(rollout.ours, policy),
        "generate": partial(rollout.generate, theirs),
        "generate without log-probabilities": partial(rollout.generate, theirs, scored=False),
    }
    engine = None
    try:
        _require_vllm(setup)
    except LeftOut as error:
        print(f"vLLM takes no part: {error}")
    else:
        from stages.vllm.engine import VllmEngine

        settings = SamplerConfig(backend="vllm", memory_share=ENGINE_SHARE)
        config = DistillConfig(sampler=settings, dtype="bfloat16", max_new_tokens=setup.new_tokens)
        engine = VllmEngine(policy, config, setup.home / "engine", max(map(len, prompts)))
        sides["vllm"] = partial(rollout.with_vllm, engine, policy)
    try:
        return rollout.measure(sides, prompts, setup.group, setup.new_tokens, setup.rounds)
    finally:
        if engine is not None:
            engine.close()


def trl(setup: Setup) -> Figures:
    """The merge's step beside TRL's `DistillationTrainer`, one teacher, completions of the longest length."""
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} are not installed; `pip install trl==1.16.0` brings them")
    import opd_sides
    import opd_step

    base, _ = base_and_experts(setup)
    (teacher,) = opd_sides.make_teachers(setup.store, base, 1, lora=False)
    case = opd_sides.Case(
        "trl", setup.prompts, setup.new_tokens, fixed=True, dtype="bfloat16",
        micro_batch_tokens=setup.micro_batch_tokens,
    )  # fmt: skip
    domains = plan(setup).config.domains
    loaded = [load_domain(name, d.kind, d.options) for name, d in domains.items()]
    examples = opd_sides.draw_examples(loaded, max(16, case.batch))
    (result,) = opd_step.against_trl([case], setup.store, base, teacher, examples, setup.rounds)
    ours, theirs = result["median"]["length"], result["median"]["trl_length"]
    if (ours, theirs) != (setup.new_tokens, setup.new_tokens):
        raise RuntimeError(f"completions have {ours} tokens, TRL's {theirs}, in place of {setup.new_tokens}")
    return result


PARTS: dict[str, Callable[[Setup], Figures]] = {
    "prepare": prepare,
    "card": card,
    "merge": merge,
    "trace": trace,
    "sampler": sampler,
    "trl": trl,
    "merge_vllm": merge_vllm,
    "merge_servers": merge_servers,
}
# Seconds after which a part is ended.
LIMITS = {
    "prepare": 90, "card": 30, "merge": 120, "trace": 75, "sampler": 180, "trl": 120, "merge_vllm": 180,
    "merge_servers": 210,
}  # fmt: skip


def file_of(out: Path, part: str) -> Path:
    """Where a part's figures are written."""
    return out / f"part-{part}.json"
