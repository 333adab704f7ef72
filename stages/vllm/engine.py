"""vLLM in the trainer's process: it samples with the student's weights, which are handed over before every rollout.

The engine starts with a model of the student's shape and dummy weights. Full weights are handed over by vLLM's own
`reload_weights`, tensor by tensor, from the trainer's parameters. For a LoRA student the base is handed over once, then
the adapter of each version replaces the previous one. On a GPU the engine sleeps during updates, so that its memory is
free.

Of several processes each has an engine with the whole model on its own device, for its own rows. They are started and
handed weights at the same time: vLLM makes its process groups beside the trainer's (`external_launcher`), and sharded
weights are gathered one tensor at a time. Sampling communicates nothing.
"""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from base.errors import UserError
from base.extras import require_vllm
from base.hashing import stable_hash
from stages.config.on_policy import OnPolicyConfig
from stages.learner.training import Learner
from stages.model.policy import Policy, causal_lm
from stages.model.stop_strings import StopStrings
from stages.sampling.sampler import parse_logprobs
from stages.sampling.samples import Gap, Sample, Sampling
from stages.vllm.handover import Probe, adapter_weights, check_shapes, full_weights, weight_shapes
from stages.vllm.settings import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    ONE_PROCESS,
    barring,
    cpu_batch_tokens,
    cpu_cache_bytes,
    logprobs_mode,
    lora_rank,
    model_overrides,
    needed_context,
    rows_at_a_time,
)
from stages.vllm.worker import EXTENSION


@dataclass(frozen=True)
class Use:
    """What an engine is used for.

    Attributes:
        name: The engine, in messages.
        key: The run file's key that asks for vLLM.
        sleeps: Whether it frees a GPU's memory after each request, since the next one follows a hand-over of weights.
    """

    name: str
    key: str
    sleeps: bool


ROLLOUTS = Use("vLLM in the trainer's process", "sampler.backend", sleeps=True)
EVALUATION = Use("vLLM in the evaluation's process", "evaluate.backend", sleeps=False)


class VllmEngine:
    """A `Sampler` with an engine in this process.

    Args:
        policy: The student; only its shape is used, its weights are handed over later.
        config: Lengths, temperature, number type and `sampler`.
        folder: Folder for the model's config and for adapters.
        longest_prompt: Tokens of the longest prompt; with `max_new_tokens` it sets the engine's context, and so the
            least size of its cache. The model's own context if absent.
        learner: The student with the processes that train it; this one alone if absent.
        use: What the engine is used for.

    Raises:
        UserError: vLLM is not installed, cannot run on this device, or cannot report the log-probabilities that these
            settings need.
    """

    def __init__(
        self,
        policy: Policy,
        config: OnPolicyConfig,
        folder: Path,
        longest_prompt: int | None = None,
        learner: Learner | None = None,
        use: Use = ROLLOUTS,
    ) -> None:
        self.cuda = torch.cuda.is_available()
        self.use = use
        self.sleeps = self.cuda and use.sleeps
        self.learner = learner
        self.processes = 1 if learner is None else learner.world_size
        require_vllm(use.key, gpus=int(self.cuda))
        self.mode = logprobs_mode(config.temperature, config.top_p)
        wanted = ENVIRONMENT | ONE_PROCESS | ({} if self.cuda else CPU_ENVIRONMENT)
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self.folder = folder
        self.config = config
        self.shapes = weight_shapes(policy)
        self.stop_ids = list(policy.stop_ids)
        self.tokenizer = policy.tokenizer
        self.bias = barring(policy.barred_ids)
        self.lora = config.lora
        shutil.rmtree(folder, ignore_errors=True)
        causal_lm(policy.model).config.save_pretrained(folder)
        context = needed_context(policy.context, longest_prompt, config.max_new_tokens)
        self.engine: Any = LLM(
            model=str(folder),
            load_format="dummy",
            hf_overrides=model_overrides(type(causal_lm(policy.model)).__name__),
            runner="generate",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=config.dtype,
            max_model_len=context,
            logprobs_mode=self.mode,
            max_num_seqs=rows_at_a_time(config, self.processes),
            enforce_eager=not self.cuda,
            disable_log_stats=True,
            worker_extension_cls=EXTENSION,
            **({"distributed_executor_backend": "external_launcher"} if self.processes > 1 else {}),
            **self._memory(policy, config, context),
            **self._adapters(),
        )
        self._request: Any = None
        self._has_base = False
        self._version = 0
        self._fault: str | None = "no weights were handed over yet"
        # Whether a load failed: vLLM's layers cannot take another load then.
        self._damaged = False
        self._sleep()

    def _memory(self, policy: Policy, config: OnPolicyConfig, context: int | None) -> dict[str, Any]:
        if self.cuda:
            return {"gpu_memory_utilization": config.sampler.memory_share, "enable_sleep_mode": self.sleeps}
        rows, shape = rows_at_a_time(config, self.processes), causal_lm(policy.model).config.get_text_config()
        # The processes of a host share its memory.
        share = config.sampler.memory_share / self.processes
        context = context or shape.max_position_embeddings
        return {
            "kv_cache_memory_bytes": cpu_cache_bytes(shape, config.dtype, rows, config.max_new_tokens, share, context),
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": cpu_batch_tokens(context),
        }

    def _adapters(self) -> dict[str, Any]:
        if self.lora is None:
            return {}
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(self.lora)}

    def update_weights(self, policy: Policy, version: int) -> None:
        """Load the policy's weights; cached results of the previous weights are dropped. All processes must call it.

        Raises:
            UserError: the weights do not fit the engine's model, cannot be loaded, or give other log-probabilities
                than the policy's own forward pass. After a failed load the engine neither samples nor takes weights
                again.
        """
        if self._damaged:
            raise UserError(f"{self.use.name} takes no weights after a load that failed: {self._fault}")
        # From here on the previous weights must not be sampled from, even if these do not fit.
        self._version, self._fault = version, "the last weights it was given did not fit"
        check_shapes(weight_shapes(policy), self.shapes, self.use.name)
        # An interrupted hand-over leaves a mixture of two versions.
        self._damaged, self._fault = True, "a hand-over of weights did not end"
        # In every process: a forward pass of sharded weights needs all of them.
        with contextlib.nullcontext() if self.learner is None else self.learner.layers_gathered_in_turn():
            probe = Probe.of(policy, self.config)
        try:
            with self._own_precision():
                scored = self._take(policy, version, probe)
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self.use.name} cannot load the student's weights ({self._fault}); sample with {self.use.key}: "
                f"transformers"
            ) from error
        self._damaged, self._fault = False, "its log-probabilities were not the trainer's"
        probe.check(scored, self.use.name, self.use.key)
        self._fault = None

    def _take(self, policy: Policy, version: int, probe: Probe) -> list[float]:
        """Load the weights, and return the engine's log-probabilities of the probe's completion."""
        self._wake("weights")
        if self.lora is None or not self._has_base:
            # Sharded ones are sent in the engine's number type, each as soon as it is gathered.
            dtype = torch.bfloat16 if self.config.dtype == "bfloat16" and self.processes > 1 else None
            self.engine.collective_rpc("take_weights", kwargs={"tensors": full_weights(policy, dtype)})
            self._has_base = True
        if self.lora is not None:
            self._request = self._adapter(policy, version)
        self._wake("kv_cache")
        self.engine.reset_prefix_cache()
        return self._score(probe)

    def _score(self, probe: Probe) -> list[float]:
        """Log-probabilities of a probe's completion, at temperature 1."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        requests = [{"prompt_token_ids": probe.tokens}]
        (answer,) = self.engine.generate(requests, [parameters], use_tqdm=False, lora_request=self._request)
        pairs = zip(answer.prompt_logprobs[probe.start :], probe.tokens[probe.start :], strict=True)
        return [float(by_id[token].logprob) for by_id, token in pairs]

    def _adapter(self, policy: Policy, version: int) -> Any:
        """Write this version's adapter and return vLLM's handle of it; the previous adapter is removed."""
        from vllm.lora.request import LoRARequest

        if self._request is not None:
            self.engine.llm_engine.remove_lora(self._request.lora_int_id)
            shutil.rmtree(self._request.lora_path)
        folder = self.folder / f"adapter-{version}"
        assert isinstance(policy.model, PeftModel)
        policy.model.save_pretrained(
            folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=adapter_weights(policy)
        )
        # vLLM's adapter ids begin with 1.
        return LoRARequest(f"student-{version}", version + 1, str(folder))

    def sample(
        self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Arguments and result as for `stages.sampling.sampler.sample`.

        Raises:
            UserError: a prompt with its completion does not fit the model's context, or `sampling` needs
                log-probabilities of another kind than the engine was started for, or the last hand-over of weights
                failed.
        """
        from vllm import SamplingParams

        if self._fault is not None:
            raise UserError(f"{self.use.name} does not sample without the student's weights: {self._fault}")
        if sampling.temperature > 0 and logprobs_mode(sampling.temperature, sampling.top_p) != self.mode:
            raise UserError(f"the engine reports {self.mode}, which does not fit temperature {sampling.temperature}")
        if not prompts:
            self._sleep()
            return []
        check_context(prompts, sampling.max_new_tokens, self.context)
        # vLLM refuses several greedy completions of one prompt, which would all be the same.
        drawn, copies = (group_size, 1) if sampling.temperature > 0 else (1, group_size)
        parameters = [
            SamplingParams(
                n=drawn,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                # The student's own stop tokens are used; the model's config may name others.
                ignore_eos=True,
                stop_token_ids=self.stop_ids,
                logit_bias=self.bias,
                seed=prompt_seed(seed, index),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        with self._own_precision():
            found = self.engine.generate(requests, parameters, use_tqdm=False, lora_request=self._request)
        self._sleep()
        # The engine has no tokenizer, so completions are cut at stop strings after they are drawn.
        stop = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        return [
            [self._sample(prompt, output, stop) for output in sorted(answer.outputs, key=lambda o: o.index)] * copies
            for prompt, answer in zip(prompts, found, strict=True)
        ]

    def _sample(self, prompt: list[int], output: Any, stop: StopStrings | None) -> Sample:
        ids = list(output.token_ids)
        cut = None if stop is None else stop.length(ids)
        ids = ids[:cut]
        # The sampled token's log-probability comes first; that of the likeliest token may follow.
        logprobs = [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
        ended = cut is not None or (bool(ids) and ids[-1] in self.stop_ids)
        return Sample(prompt, ids, parse_logprobs(logprobs[: len(ids)], "vLLM"), ended, self._version)

    def drain_log(self) -> list[str]:
        """Always empty: there are no servers to report on."""
        return []

    @property
    def context(self) -> int:
        """Tokens of the longest row, prompt and completion."""
        return int(self.engine.model_config.max_model_len)

    def logprob_gap(self) -> Gap | None:
        """Always None: samples are drawn with the trainer's weights, so the loop measures the gap on them."""
        return None

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        core = self.engine.llm_engine.engine_core
        if self.processes == 1:
            core.shutdown()
        else:
            # Without vLLM's own clean-up, which would destroy the trainer's process group too, and which the client
            # would run as soon as it is collected.
            core._finalizer.detach()
            core.engine_core.model_executor.shutdown()
            core.engine_core.scheduler.shutdown()
        del core, self.engine
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _own_precision(self) -> Iterator[None]:
        """A context without the trainer's autocast, which is on where the weights of a sharded student are whole."""
        with torch.autocast("cuda" if self.cuda else "cpu", enabled=False):
            yield

    def _sleep(self) -> None:
        """Free the device's memory for the trainer: the cache, and weights that will be handed over again."""
        if self.sleeps:
            self.engine.sleep(level=1 if self._has_base and self.lora else 2)

    def _wake(self, part: str) -> None:
        if self.sleeps:
            self.engine.wake_up(tags=[part])


def prompt_seed(seed: int, index: int) -> int:
    """The seed of one prompt of a rollout; vLLM derives each completion's seed from it by counting up."""
    return int(stable_hash([seed, index])[:15], 16)


def check_context(prompts: Sequence[list[int]], max_new_tokens: int, limit: int) -> None:
    """Check that all prompts leave room for their completions.

    Raises:
        UserError: one does not.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the engine's context of {limit} "
            f"tokens; lower max_new_tokens or shorten the domain's prompts"
        )
