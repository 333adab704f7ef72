"""How far a checkpoint moved from the run's start: KL both ways, the shape of its completions, its weights.

arXiv:2509.04259 relates forgetting to KL(start || checkpoint) along the start's own completions of a task's prompts.
Every token's divergence is exact over the vocabulary; means are over tokens. Prompts are the same held-out ones for all
checkpoints and seeds, and both models draw with the same random numbers.

Shape suffixes: N concatenated completion tokens, C those of one chunk, H hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from base.errors import UserError
from base.store.checkpoint import Artifact
from evals.comparison.scores import EXAMPLES_SEED
from evals.comparison.shift_sheet import SHIFT_FILE, DomainShift, ExampleShift, ShiftSheet
from evals.measure.task_vectors import weight_shift
from experts.domain import HELD_OUT, Domain
from stages.config.shift import ShiftRequest
from stages.learner.device import accelerator
from stages.learner.training import step_seed
from stages.learner.workspace import Workspace
from stages.losses.chunked import chunk_length, chunked_token_loss
from stages.losses.divergences import forward_kl
from stages.model.policy import HiddenStates, Policy, load_policy
from stages.model.precision import head_factor, head_logits
from stages.model.weights import StoredWeights
from stages.on_policy.health import compression
from stages.rows.chat import encode_prompt
from stages.rows.packing import micro_batches, pack
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling

MICRO_BATCH_TOKENS = 16384


@torch.no_grad()
def run(config: ShiftRequest, workspace: Workspace) -> Artifact:
    """Measure the parent `checkpoint` against the parent `start`, on every domain of the workspace.

    Returns:
        `shift.json`, and its values among the metrics as `shift/MEASURE/DOMAIN` and `shift/MEASURE` of the weights.

    Raises:
        UserError: a domain cannot supply the examples, or a prompt does not fit the model.
    """
    parents, store, journal = workspace.parents, workspace.store, workspace.journal()
    device = accelerator(float32_matmul=config.float32_matmul).device
    total = len(workspace.domains) + 1
    compared, code = (parents["start"], parents["checkpoint"]), workspace.remote_code
    weights = weight_shift(*(StoredWeights(each, store, code) for each in compared))
    journal.progress(1, total)
    start, policy = (load_policy(each, store, remote_code=code) for each in compared)
    for loaded in (start, policy):
        loaded.compute_in(config.dtype)
        loaded.model.to(device)
    shifts = {}
    for step, (name, domain) in enumerate(workspace.domains.items(), 2):
        shifts[name] = domain_shift(config, start, policy, domain, step_seed(workspace.seed, 0, f"shift {name}"))
        journal.progress(step, total)
    sheet = ShiftSheet(domains=shifts, weights=weights)
    metrics = {"/".join(filter(None, ("shift", *key))): value for key, value in sheet.values().items()}
    journal.metrics(total, metrics)
    folder = store.staging(workspace.key)
    (folder / SHIFT_FILE).write_text(sheet.model_dump_json(indent=1))
    return workspace.commit(folder, trained_on=None, metrics=metrics)


def domain_shift(config: ShiftRequest, start: Policy, policy: Policy, domain: Domain, seed: int) -> DomainShift:
    """Measure a policy against the start on a domain's held-out prompts.

    Args:
        config: The number of prompts, and how completions are drawn.
        start: The start.
        policy: Trained from the start, so it has the same vocabulary; on the same device.
        domain: The domain whose prompts are used.
        seed: Both models draw with it.

    Raises:
        UserError: the domain has no held-out examples, or a prompt does not fit the model.
    """
    examples = domain.draw_up_to(config.examples, HELD_OUT, EXAMPLES_SEED)
    if not examples:
        raise UserError(f"domains.{domain.name}: no {HELD_OUT} examples")
    prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in examples]
    sampling = Sampling(config.max_new_tokens, config.temperature, 1.0, config.batch_size)
    theirs, ours = ([drawn for (drawn,) in sample(who, prompts, 1, sampling, seed)] for who in (start, policy))
    on_theirs, on_ours = (divergences(start, policy, drawn, config.temperature) for drawn in (theirs, ours))
    rows = [
        ExampleShift(
            id=example.id,
            source=example.source,
            kl_start=float(on_theirs["forward_kl"][i].mean()),
            start_tokens=len(theirs[i].completion_ids),
            kl_policy=float(on_ours["reverse_kl"][i].mean()),
            entropy=float(on_ours["entropy"][i].mean()),
            tokens=len(ours[i].completion_ids),
        )
        for i, example in enumerate(examples)
    ]
    return DomainShift(
        kl_start=float(torch.cat(on_theirs["forward_kl"]).mean()),
        kl_policy=float(torch.cat(on_ours["reverse_kl"]).mean()),
        entropy=float(torch.cat(on_ours["entropy"]).mean()),
        length=sum(row.tokens for row in rows) / len(rows),
        repetition=compression(policy.texts(drawn.completion_ids for drawn in ours)),
        examples=rows,
    )


@torch.no_grad()
def divergences(
    start: Policy, policy: Policy, samples: Sequence[Sample], temperature: float
) -> dict[str, list[Tensor]]:
    """Exact divergences at every token of some completions, whichever model drew them.

    Args:
        start: The start.
        policy: Another model with the same vocabulary, on the same device.
        samples: Completions.
        temperature: Divides both models' logits.

    Returns:
        In nats, one vector [N] per completion: `forward_kl`, KL(start || policy); `reverse_kl`, KL(policy || start);
        `entropy`, the policy's.
    """
    found: dict[str, list[Tensor]] = {}
    for batch in micro_batches([len(drawn.tokens) for drawn in samples], MICRO_BATCH_TOKENS):
        lengths = [len(samples[i].completion_ids) for i in batch]
        for name, values_N in _of_batch(start, policy, [samples[i] for i in batch], temperature).items():
            rows = found.setdefault(name, [torch.empty(0)] * len(samples))
            for i, part_N in zip(batch, values_N.double().cpu().split(lengths), strict=True):
                rows[i] = part_N
    return found


def _of_batch(start: Policy, policy: Policy, samples: Sequence[Sample], temperature: float) -> Mapping[str, Tensor]:
    """The divergences of concatenated completions; logits of both models exist for one chunk of tokens at a time."""
    starts = [len(drawn.prompt_ids) for drawn in samples]
    packed = pack([drawn.tokens for drawn in samples], starts, policy.pad_id, policy.device)
    ours_NH, theirs_NH = (packed.scored(HiddenStates(who.model, who.dtype)(*packed.inputs)) for who in (policy, start))
    factor_VH = head_factor(start.head_VH, theirs_NH.dtype)

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        theirs_CV = head_logits(theirs_NH[part], factor_VH)
        forward_C, metrics = forward_kl(logits_CV / temperature, theirs_CV / temperature)
        return forward_C, {**metrics, "forward_kl": forward_C}

    weights_N = torch.ones(len(ours_NH), device=ours_NH.device)
    chunk = chunk_length(policy.head_VH.shape[0], policy.device)
    _, found = chunked_token_loss(ours_NH, policy.head_VH, weights_N, token_loss, chunk)
    return found
