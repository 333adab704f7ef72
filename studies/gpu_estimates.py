"""Time and memory of a merge of Qwen3-8B on one H100 and on eight: arithmetic, not measurement.

    python -m studies.gpu_estimates

prints two tables in Markdown, which docs/gpu.md has. *Before* is the code of 28 November 2026, *after* today's. Work is
counted from the model's shape, settings come from the run files, memory and chunks from the product's own plan
(`flows.engines.memory`, `stages.config.chunks`). What the hardware and the host reach is assumed (`studies.gpu_costs`).
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory
from flows.engines.memory import trained, training_phases
from flows.engines.shapes import Shape, shape_of_config
from flows.plan.graph import build_graph
from flows.plan.nodes import Node, StageGraph
from flows.run_file.load import load_run_file
from flows.run_file.schema import STUDENT
from stages.config.distill import DistillConfig
from studies import gpu_work
from studies.gpu_costs import (
    AFTER,
    BEFORE,
    CARD,
    CARD_BYTES,
    GIB,
    HOST,
    Code,
    Range,
    chunk,
    decode,
    decode_device,
    decode_host,
    hand_over,
    head_rate,
    prefill,
    teacher_again,
    token,
)
from studies.gpu_work import Rows
from studies.sizes import qwen3_8b

RUNS = Path(__file__).parents[1] / "flows" / "runs"
ONE, EIGHT = "qwen3_8b_lora.yaml", "qwen3_8b.yaml"
# The base is not at hand: its shape is put in its place.
WITHOUT_BASE = ("base={pretrain: {}}", "chat_template_kwargs={}")
DEVICE = Memory(CARD_BYTES, CARD_BYTES, "a GPU", "NVIDIA H100 80GB HBM3")
# Assumed for what a vLLM server on a device holds beside weights and cache.
SERVER_BYTES = 2 * 2**30
Figure = Callable[[Code], str]


def qwen3_shape() -> Shape:
    """The shape of Qwen3-8B."""
    return shape_of_config(qwen3_8b().to_dict(), 0)


@dataclass(frozen=True)
class Run:
    """A run file's merge of Qwen3-8B.

    Attributes:
        graph: The run.
        node: The merge.
        config: Its settings.
        shape: The model's.
    """

    graph: StageGraph
    node: Node
    config: DistillConfig
    shape: Shape

    @classmethod
    def of(cls, name: str, *overrides: str) -> "Run":
        """Read a run file of `flows/runs`."""
        with tempfile.TemporaryDirectory() as folder:
            graph = build_graph(load_run_file(RUNS / name, [*WITHOUT_BASE, *overrides]), Path(folder))
        node = next(node for node in graph.nodes if node.name == STUDENT)
        return cls(graph, node, DistillConfig(**node.config), qwen3_shape())

    @property
    def processes(self) -> int:
        """Devices that train."""
        return self.graph.config.resources.gpus

    @property
    def rows(self) -> Rows:
        """The rows of a step: prompts of `PROMPT_TOKENS`, completions as long as allowed."""
        count = self.config.prompts_per_step * self.config.group_size
        return Rows.of([(terms.PROMPT_TOKENS, self.config.max_new_tokens)] * count)

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.config.prompts_per_step * self.config.group_size

    def phases(self) -> dict[str, dict[str, int]]:
        """The memory plan's bytes of each phase on one device, by purpose."""
        return training_phases(self.graph, self.node, trained(self.graph, self.node, self.shape), DEVICE)

    def peaks(self) -> dict[str, float]:
        """The memory plan's GiB of each phase on one device."""
        return {name: sum(parts.values()) / GIB for name, parts in self.phases().items()}


def rollout(code: Code, run: Run) -> Range:
    """Seconds of a step's rollouts."""
    config, shape = run.config, run.shape
    mean = terms.PROMPT_TOKENS + config.max_new_tokens / 2
    if config.sampler.backend == "vllm":
        # Its CUDA graphs take no time of the host, as those of servers.
        seconds = config.max_new_tokens * decode_device(AFTER, shape, run.completions, mean)
        return seconds, seconds
    if config.sampler.backend != "vllm_server":
        low, high = decode(code, shape, run.completions, mean, bool(config.lora))
        first = prefill(code, shape, config.prompts_per_step * terms.PROMPT_TOKENS)
        return first + config.max_new_tokens * low, first + config.max_new_tokens * high
    servers = run.graph.config.resources.rollout_servers
    mine = -(-run.completions // servers.count)
    # The server is bfloat16 in either code.
    room = servers.memory_share * DEVICE.total - SERVER_BYTES - 2 * shape.parameters
    together = min(mine, int(room / (mean * gpu_work.cache_values(shape) * 2)))
    steps = config.max_new_tokens * mine / together
    seconds = steps * decode_device(AFTER, shape, together, mean)
    return seconds, seconds


def teach(run: Run) -> float:
    """Seconds in which the teachers score a step's rows, without local teachers' heads: the update multiplies them."""
    work = gpu_work.score(run.shape, run.rows)
    if run.config.teacher_backend == "local":
        return work / CARD.bfloat16 / run.processes
    # A server computes the logits of prompts too; its answers have the likeliest tokens and the sampled one.
    work += 2.0 * run.shape.embedding * run.rows.tokens
    likeliest = run.config.objective.likeliest
    entries = run.rows.scored * (1 + (likeliest.k if likeliest else 0))
    return work / CARD.bfloat16 + entries * HOST.entry * (1 + 1 / run.processes)


def update(code: Code, run: Run) -> float:
    """Seconds of a step's update, without the exchange of gradients, which overlaps with it."""
    config, shape, rows = run.config, run.shape, run.rows
    whole = gpu_work.update(
        shape, rows, adapters=bool(config.lora), recomputed=config.gradient_checkpointing,
        teacher_heads=int(config.teacher_backend == "local"),
    )  # fmt: skip
    heads = gpu_work.head_forward(shape, rows) * ((2 if config.lora else 3) + int(config.teacher_backend == "local"))
    seconds = (whole - heads) / CARD.bfloat16 + heads / head_rate(code) + rows.scored * chunk(code, shape)[1]
    return seconds / run.processes


def exchange(run: Run) -> float:
    """Seconds of FSDP's exchange of a step, which may hide behind the update: for each micro-batch bfloat16 weights
    twice and float32 gradients once."""
    if run.config.sharding != "fsdp":
        return 0.0
    batches = -(-run.rows.tokens // (run.processes * run.config.micro_batch_tokens))
    moved = run.shape.parameters * (2 * 2 + 4) * (run.processes - 1) / run.processes
    return batches * moved / CARD.nvlink


def parts() -> list[tuple[str, str, str]]:
    """The first table: what, before, after."""
    shape = qwen3_shape()
    found = []

    def row(what: str, show: Figure) -> None:
        found.append((what, show(BEFORE), show(AFTER)))

    row("decoding a token, 64 rows at 1024: device", lambda c: f"{1e3 * decode_device(c, shape, 64, 1024):.0f} ms")
    row(
        "the same of a student trained in full",
        lambda c: f"{1e3 * decode_device(c, shape, 64, 1024, cast=True):.0f} ms",
    )
    row("the same: host, eager", lambda c: _range(decode_host(c, shape, False), 1e3, "ms"))
    row(
        "the same with adapters: host",
        lambda c: _range(decode_host(c, shape, True), 1e3, "ms") if c.narrow else "not counted",
    )
    row("prefill of 16,384 tokens", lambda c: f"{prefill(c, shape, 16384):.2g} s")
    row("cache of a token", lambda c: f"{gpu_work.cache_values(shape) * c.width / 1e3:.0f} KB")
    row("teacher and update of a token: layers", lambda c: f"{1e6 * token(c, shape)[0]:.0f} µs")
    row("the same: both heads", lambda c: f"{1e6 * token(c, shape)[1]:.0f} µs")
    row("heads' share of the two", lambda c: f"{token(c, shape)[1] / sum(token(c, shape)):.0%}")
    row("chunk of logits", lambda c: f"{chunk(c, shape)[0]:,} tokens")
    row("heads read and written, a token", lambda c: f"{1e6 * chunk(c, shape)[1]:.1f} µs")
    row("full student to a server", lambda c: _moved(hand_over(c, shape, by_file=not c.narrow)))
    row("the same of a sharded student, by a file", lambda c: _moved(hand_over(c, shape, by_file=True)))
    row("a full teacher that is not resident", lambda c: f"{teacher_again(c, shape):.1f} s")
    row("FSDP over six: gathered weights and gradients", lambda c: f"{_gathered(c):.0f} GiB")
    return found


def _gathered(code: Code) -> float:
    """GiB of a sharded student's gathered weights and of its gradients on a device, between micro-batches."""
    run = Run.of(EIGHT)
    if not code.narrow:
        return 2 * terms.FLOAT * run.shape.parameters / GIB
    update_parts = run.phases()["update"]
    return (update_parts["gathered weights"] + update_parts["gradients"]) / GIB


def steps() -> list[tuple[str, ...]]:
    """The second table: a step of the run files' merges, before and after."""
    local = ("resources.gpus=4", "resources.rollout_servers.count=4", "merge.teacher_backend=local")
    cases = [
        (f"`{ONE}`, before", BEFORE, Run.of(ONE)),
        (f"`{ONE}`", AFTER, Run.of(ONE)),
        ("the same, `resources.sampler: vllm`", AFTER, Run.of(ONE, "resources.sampler=vllm")),
        (f"`{EIGHT}`, before", BEFORE, Run.of(EIGHT)),
        (f"`{EIGHT}`", AFTER, Run.of(EIGHT)),
        ("the same, 4 trainers, 4 rollout servers, local teachers", AFTER, Run.of(EIGHT, *local)),
    ]
    found = []
    for name, code, run in cases:
        moved = 0.0 if run.config.lora else hand_over(code, run.shape, by_file=True)[1]
        rolled, taught, updated = rollout(code, run), teach(run), update(code, run)
        # The exchange hides behind the update as far as it is shorter.
        rest = moved + taught + max(updated, exchange(run))
        peaks = run.peaks() if code.narrow else {}
        found.append(
            (
                name,
                _range(rolled, 1, "s"),
                f"{moved:.0f} s" if moved else "–",
                f"{taught:.0f} s",
                f"{updated:.0f} s",
                f"{exchange(run):.0f} s" if exchange(run) else "–",
                _range((rolled[0] + rest, rolled[1] + rest), 1, "s"),
                ", ".join(f"{peak:.0f}" for peak in peaks.values()) or "–",
            )
        )
    return found


def _range(seconds: Range, scale: float, unit: str) -> str:
    low, high = (f"{scale * value:.0f}" for value in seconds)
    return f"{low} {unit}" if low == high else f"{low}-{high} {unit}"


def _moved(found: tuple[float, float]) -> str:
    size, seconds = found
    return f"{size / 1e9:.0f} GB, {seconds:.1f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page() -> str:
    """Both tables."""
    step = ("merge", "rollouts", "hand-over", "teachers", "update", "FSDP's exchange", "step", "GiB: rollout, update")
    return f"{table(('one H100', 'before', 'after'), parts())}\n\n{table(step, steps())}\n"


if __name__ == "__main__":
    sys.stdout.write(page())
