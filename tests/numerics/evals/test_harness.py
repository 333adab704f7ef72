"""lm-evaluation-harness tasks on our checkpoints: scores as our own forward gives them, in rows that we can read."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs make setup-harness")

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from base.errors import UserError
from base.store.checkpoint import Artifact
from evals.comparison.scores import Scores, read_scores
from evals.measure.harness import HarnessRequest, evaluate_tasks
from evals.measure.harness_tasks import index_tasks
from experts.domain import HELD_OUT
from stages.config.evaluation import EvaluationConfig
from stages.config.harness import HarnessConfig, HarnessTaskConfig
from stages.config.training import LoraConfig
from stages.model.policy import Policy, load_policy
from stages.rows.trained_on import TrainedOn
from stages.sampling.agreement import TOLERANCES
from tests.support.harness_home import QUESTIONS, write_tasks

Score = Callable[..., Artifact]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def score(store, workspace, folder: Path) -> Score:
    """Score a checkpoint on one task: `score(key, checkpoint, task, **settings)`."""

    def run(key: str, checkpoint: Artifact, task: str, **settings) -> Artifact:
        evaluation = EvaluationConfig(dtype=settings.pop("dtype", "float32"))
        whole = HarnessConfig(tasks=[task], include_path=str(folder), **settings)
        config = HarnessTaskConfig.of(whole, task, str(folder / f"{task}.yaml"), evaluation)
        (artifact,) = evaluate_tasks(
            [HarnessRequest(workspace(key, {"checkpoint": checkpoint}, {}), config)], checkpoint, store
        )
        return artifact

    return run


def sheet(artifact: Artifact) -> Scores:
    return read_scores(artifact.path, artifact.manifest["domain"], HELD_OUT)


def log_likelihood(policy: Policy, prompt: str, choice: str) -> float:
    """Sum of the choice's log-probabilities behind the prompt, in nats."""
    start, end = (policy.tokenizer(text)["input_ids"] for text in (prompt, choice))
    logits_TV = policy.model(torch.tensor([[*start, *end]])).logits[0]
    logprobs_TV = logits_TV.log_softmax(-1)[len(start) - 1 : -1]
    return sum(float(logprobs_TV[place, token]) for place, token in enumerate(end))


def greedy(policy: Policy, prompt: str, length: int) -> str:
    """What the model says when it always takes the likeliest token."""
    tokens = list(policy.tokenizer(prompt)["input_ids"])
    start = len(tokens)
    while len(tokens) < start + length and policy.eos_id not in tokens[start:]:
        tokens.append(int(policy.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return policy.tokenizer.decode(tokens[start:], skip_special_tokens=True)


def likeliest(policy: Policy, question: dict, by_length: bool) -> int:
    values = [log_likelihood(policy, question["question"], choice) for choice in question["choices"]]
    if by_length:
        values = [value / len(choice) for value, choice in zip(values, question["choices"], strict=True)]
    return values.index(max(values))


def test_a_multiple_choice_task_is_scored_as_our_own_forward_scores_it(store, checkpoint, score: Score) -> None:
    parent = checkpoint("model", 0)
    policy = load_policy(parent, store)
    picks = []
    for metric, by_length in (("acc", False), ("acc_norm", True)):
        artifact = score(metric, parent, "choice", metrics={} if metric == "acc" else {"choice": metric})
        found = sheet(artifact)
        picked = [likeliest(policy, question, by_length) for question in QUESTIONS]
        picks.append(picked)
        wanted = [float(pick == question["gold"]) for pick, question in zip(picked, QUESTIONS, strict=True)]
        assert 0 < sum(wanted) < len(wanted)
        assert found.greedy_N.tolist() == wanted
        assert found.samples_NK is None
        assert artifact.manifest["metrics"]["greedy"] == pytest.approx(sum(wanted) / len(wanted))
        assert artifact.manifest["harness"] == {"metric": f"{metric},none", "task_version": 1.0}
        assert {row["contaminated"] for row in found.rows} == {None}
        assert "contaminated" not in artifact.manifest["metrics"]
    assert picks[0] != picks[1]
    for row, question in zip(found.rows, QUESTIONS, strict=True):
        choices = question["choices"]
        assert row["prompt"] == question["question"]
        assert row["answer"] == choices[question["gold"]]
        assert row["greedy"]["completion"] == choices[likeliest(policy, question, False)]


def test_a_generation_task_is_judged_on_the_greedy_completion(store, checkpoint, score: Score, folder: Path) -> None:
    parent = checkpoint("model", 1)
    policy = load_policy(parent, store)
    said = [greedy(policy, question["question"], 6) for question in QUESTIONS]
    answers = [text if place % 2 else "?" for place, text in enumerate(said)]
    rows = [{**question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sheet(score("text", parent, "text"))
    assert [row["greedy"]["completion"] for row in found.rows] == said
    assert found.greedy_N.tolist() == [float(place % 2) for place in range(len(said))]
    assert [row["answer"] for row in found.rows] == answers
    assert [row["greedy"]["tokens"] for row in found.rows] == [
        len(policy.tokenizer(text)["input_ids"]) for text in said
    ]


def test_in_bfloat16_logits_are_float32_and_near_those_of_float32(
    checkpoint, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, logits = checkpoint("model", 0), []
    call = HFLM._model_call

    def noted(self, *args, **settings) -> torch.Tensor:
        logits.append(call(self, *args, **settings))
        return logits[-1]

    monkeypatch.setattr(HFLM, "_model_call", noted)
    score("wide", parent, "choice")
    wide, logits[:] = list(logits), []
    score("narrow", parent, "choice", dtype="bfloat16")
    assert len(logits) == len(wide) > 0
    for ours, exact in zip(logits, wide, strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, ours.bfloat16().float()) and not torch.equal(ours, exact)
        assert float((ours.log_softmax(-1) - exact.log_softmax(-1)).abs().max()) < TOLERANCES["bfloat16"]
    assert len(sheet(score("text", parent, "text", dtype="bfloat16")).rows) == len(QUESTIONS)


def test_two_runs_and_two_checkpoints_agree_on_the_examples(store, checkpoint, score: Score) -> None:
    first, second = checkpoint("first", 0), checkpoint("second", 1)
    settings = {"limit": 4, "num_fewshot": 2}
    once, again = score("once", first, "choice", **settings), score("again", first, "choice", **settings)
    assert (once.path / "scores.jsonl").read_bytes() == (again.path / "scores.jsonl").read_bytes()
    other = sheet(score("other", second, "choice", **settings))
    assert sheet(once).ids == other.ids
    assert len(other.ids) == 4
    shown = [row["prompt"] for row in other.rows]
    assert all(text.endswith(question["question"]) for text, question in zip(shown, QUESTIONS, strict=False))
    assert all(text.count("\n\n") == 2 for text in shown)


def test_an_adapter_is_scored_on_its_base(store, workspace, checkpoint, score: Score) -> None:
    start = checkpoint("start", 0)
    policy = load_policy(start, store, lora=LoraConfig(rank=4), trainable=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    folder = store.staging("adapter")
    policy.save(folder)
    adapter = workspace("adapter", {"start": start}, {}).commit(
        folder, trained_on=TrainedOn(), metrics={}, adapter_base="start"
    )
    found = sheet(score("scores", adapter, "choice", chat_template=True))
    loaded = load_policy(adapter, store)
    for row, question in zip(found.rows, QUESTIONS, strict=True):
        asked = {**question, "question": f"<user>{question['question']}<assistant>"}
        assert row["prompt"] == asked["question"]
        assert row["greedy"]["completion"] == question["choices"][likeliest(loaded, asked, False)]
    before = load_policy(start, store)
    assert [likeliest(before, q, False) for q in QUESTIONS] != [likeliest(loaded, q, False) for q in QUESTIONS]


@pytest.mark.parametrize(
    ("task", "metric", "said"),
    [
        ("choice", "mcc", "mcc of choice is (0, "),
        ("choice", "f1", "choice has no score f1 for each example"),
        ("choice", "acc,strict", "choice has no score acc,strict for each example"),
        ("worse", None, "exact_match of worse is better when lower"),
    ],
)
def test_a_metric_that_is_no_score_names_the_task_and_those_that_are(
    checkpoint, score: Score, task: str, metric: str | None, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        score("scores", checkpoint("model", 0), task, metrics={task: metric} if metric else {})
    assert f"evaluate.harness.metrics: {said}" in str(caught.value)
    if task == "choice":
        assert (
            "its metrics are acc,none mcc,none acc_norm,none; numbers in [0, 1] for each example: acc,none acc_norm"
            in (str(caught.value))
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generation_kwargs: {max_gen_toks: 128}", "text generates up to 128 tokens, which leaves no room"),
        ("unsafe_code: true", "text runs the code that a model writes"),
    ],
)
def test_a_task_that_cannot_be_put_to_the_model_says_why(
    checkpoint, score: Score, folder: Path, line: str, said: str
) -> None:
    path = folder / "text.yaml"
    kept = [text for text in path.read_text().splitlines() if not text.startswith(line.partition(":")[0])]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(UserError, match=f"evaluate.harness.tasks: {said}"):
        score("scores", checkpoint("model", 0), "text")


def test_our_index_is_the_harnesses_own(folder: Path) -> None:
    (folder / "several.yaml").write_text("group: several\ntask:\n  - choice\n  - text\n")
    (folder / "quoted.yaml").write_text('"include": text.yaml\n"task": "quoted_one"\n')
    ours, theirs = index_tasks(folder), TaskManager(include_defaults=False, include_path=str(folder))
    assert sorted(ours.tasks) == theirs.all_subtasks == ["choice", "quoted_one", "text", "worse"]
    assert sorted(ours.groups) == theirs.all_groups == ["several"]
