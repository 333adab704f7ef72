"""Score one checkpoint on tasks of lm-evaluation-harness, with the rows that `evals.measure.evaluate` writes.

The harness loads the task, queries the model and judges each example; the value of the task's main metric is the
example's score. These scores are thus paired, compared and counted as forgetting like those of any other domain.

Left out: sampled completions beside the harness's own, because its tasks fix how they are decoded; and contamination,
which is unknown because the prompts contain the task's own examples. The harness's `simple_evaluate` is left out as
well, because it adds a report of the machine (1.5 s) and queries the Hub for the model. Its seeds and its rule for the
number of shots are kept.
"""

import contextlib
import json
import logging
import numbers
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from evals.comparison.scores import FILE
from evals.measure.evaluate import summary
from evals.measure.harness_tasks import KEY, own_tasks
from stages.config.harness import HarnessTaskConfig
from stages.learner.device import accelerator
from stages.learner.workspace import Workspace
from stages.model.policy import Policy, causal_lm, load_policy
from stages.model.precision import keep_logits_wide
from stages.rows.rendering import template_arguments


@dataclass(frozen=True)
class HarnessRequest:
    """One node of the graph: score the checkpoint on a task.

    Attributes:
        workspace: Where the scores are written; its parent `checkpoint` is scored.
        config: The task and its settings.
    """

    workspace: Workspace
    config: HarnessTaskConfig


def run(nodes: Sequence[Mapping[str, Any]], workspaces: Sequence[Workspace]) -> None:
    """Score one checkpoint on several tasks.

    Args:
        nodes: The `HarnessTaskConfig` settings of each.
        workspaces: One per node, with the same parent `checkpoint`.
    """
    pairs = zip(nodes, workspaces, strict=True)
    requests = [HarnessRequest(workspace, HarnessTaskConfig(**node)) for node, workspace in pairs]
    evaluate_tasks(requests, workspaces[0].parents["checkpoint"], workspaces[0].store)


def evaluate_tasks(requests: Sequence[HarnessRequest], checkpoint: Artifact, store: Store) -> list[Artifact]:
    """Score one checkpoint on several tasks.

    Returns:
        One artifact per request: `scores.jsonl` with a row per example, and in its manifest the mean score, the
        metric's name and the task's version.

    Raises:
        UserError: there is no such task, it cannot be run on this model, or a metric is not a number in [0, 1] for each
            example.
    """
    # The harness logs every argument that it does not use.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Tasks of one process are those of one run file, with its number types.
    config = requests[0].config
    device = accelerator(float32_matmul=config.float32_matmul).device
    policy = load_policy(checkpoint, store, remote_code=requests[0].workspace.remote_code)
    policy.compute_in(config.dtype)
    if config.dtype == "bfloat16":
        keep_logits_wide(causal_lm(policy.model))
    policy.model.to(device)
    return [_evaluate(request, policy) for request in requests]


def _evaluate(request: HarnessRequest, policy: Policy) -> Artifact:
    config, workspace = request.config, request.workspace
    journal = workspace.journal()
    journal.progress(0, 1)
    lm = HFLM(
        pretrained=policy.model,
        tokenizer=policy.tokenizer,
        backend="causal",
        batch_size=config.batch_size,
        mixed_precision_dtype="bfloat16" if config.dtype == "bfloat16" else None,
        chat_template_args=template_arguments(),
    )
    task = _load_task(config)
    _check(task, config, lm)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    results = evaluate(
        lm=lm,
        task_dict={"tasks": {config.task: task}},
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
    )
    samples = results["samples"][config.task]
    metric, kept = _chosen(config, task, samples)
    if results["higher_is_better"][config.task].get(metric) is False:
        raise UserError(f"{KEY}.metrics: {metric} of {config.task} is better when lower; {_choices(samples)}")
    rows = [_row(config, sample, _score(config, metric, sample, samples), lm) for sample in kept]
    metrics = summary(rows)
    journal.metrics(1, {f"eval/{name}/{config.domain}": value for name, value in metrics.items()})
    journal.progress(1, 1)
    folder = workspace.store.staging(workspace.key)
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"metric": f"{metric},{kept[0]['filter']}", "task_version": results["versions"][config.task]}
    return workspace.commit(
        folder, trained_on=None, metrics=metrics, domain=config.domain, split=config.split, harness=facts
    )


def _load_task(config: HarnessTaskConfig) -> Task:
    """Read the task and its data, and set its number of shots as the harness's own command does."""
    if config.file is None:
        file = own_tasks().tasks.get(config.task)
        if file is None:
            raise UserError(f"{KEY}.tasks: the harness has no task '{config.task}'")
    else:
        file = Path(config.file)
    # Indexing all tasks would take the harness 8 s.
    manager = TaskManager(include_defaults=False)
    # A dataset's name on the Hub must not be taken for a folder beside one of the harness's own YAMLs.
    with contextlib.chdir(file.parent) if config.file else contextlib.nullcontext():
        task = manager.load([str(file)])["tasks"][config.task]
    own = task.get_config("num_fewshot")
    if own is None or (config.num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", config.num_fewshot or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return task


def _check(task: Task, config: HarnessTaskConfig, lm: HFLM) -> None:
    """Check that the task can be run on this model."""
    if task.get_config("unsafe_code"):
        raise UserError(
            f"{KEY}.tasks: {config.task} runs the code that a model writes, outside any sandbox; the domain kind "
            f"human_eval runs such code inside one"
        )
    if config.chat_template and lm.tokenizer.chat_template is None:
        raise UserError(f"{KEY}.chat_template: the model's tokenizer has no chat template")
    if task.OUTPUT_TYPE == "generate_until":
        asked = normalize_gen_kwargs(task.get_config("generation_kwargs"), lm.max_gen_toks)["max_gen_toks"]
        if asked >= lm.max_length:
            raise UserError(
                f"{KEY}.tasks: {config.task} generates up to {asked} tokens, which leaves no room for a prompt in a "
                f"context of {lm.max_length}; its generation_kwargs.max_gen_toks sets this number"
            )


def _chosen(
    config: HarnessTaskConfig, task: Task, samples: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Mapping[str, Any]]]:
    """The metric that is the score (the run file's choice, else the first), and the samples as filtered for it."""
    listed = [entry["metric"] for entry in task.get_config("metric_list") or []]
    asked = config.metric or (listed or samples[0]["metrics"])[0]
    metric, _, named = str(asked).partition(",")
    kept = [sample for sample in samples if sample["filter"] == (named or samples[0]["filter"])]
    if not kept or metric not in kept[0]["metrics"]:
        raise UserError(f"{KEY}.metrics: {config.task} has no score {asked} for each example; {_choices(samples)}")
    return metric, kept


def _score(
    config: HarnessTaskConfig, metric: str, sample: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> float:
    """The metric's value on one example."""
    value = sample[metric]
    if not _is_share(value):
        raise UserError(
            f"{KEY}.metrics: {metric} of {config.task} is {value!r} on example {sample['doc_id']}, no number in "
            f"[0, 1]; {_choices(samples)}"
        )
    return float(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_) and 0 <= float(value) <= 1


def _choices(samples: Sequence[Mapping[str, Any]]) -> str:
    """A text that lists all metrics of a task and those that can be scores."""
    values: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    fit = [name for name, all_of in values.items() if all(_is_share(value) for value in all_of)]
    return f"its metrics are {' '.join(values)}; numbers in [0, 1] for each example: {' '.join(fit) or 'none'}"


def _row(config: HarnessTaskConfig, sample: Mapping[str, Any], score: float, lm: HFLM) -> dict[str, Any]:
    """The score sheet's row of one example."""
    arguments = sample["arguments"]
    answer, completion = sample["target"], _completion(sample)
    limit = None
    if isinstance(arguments[0][-1], Mapping):
        limit = normalize_gen_kwargs(arguments[0][-1], lm.max_gen_toks)["max_gen_toks"]
    elif isinstance(answer, int) and len(arguments) > 1 and 0 <= answer < len(arguments):
        answer = arguments[answer][-1]
    tokens = len(lm.tok_encode(completion, add_special_tokens=False))
    identity = f"{config.task}/{sample['doc_id']}/{sample['doc_hash'][:8]}"
    return {
        "id": identity,
        "source": identity,
        "prompt": arguments[0][0],
        "answer": str(answer),
        "contaminated": None,
        "greedy": {
            "completion": completion,
            "score": score,
            "tokens": tokens,
            "truncated": limit is not None and tokens >= limit,
        },
        "samples": [],
    }


def _completion(sample: Mapping[str, Any]) -> str:
    """The model's answer: the text it generated, or the choice it finds most likely."""
    answers = [responses[0] for responses in sample["resps"]]
    if isinstance(answers[0], str):
        return answers[0]
    likeliest = max(range(len(answers)), key=lambda place: answers[place][0])
    return str(sample["arguments"][likeliest][-1])
