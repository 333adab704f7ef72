"""vLLM in the trainer's process: it samples with the student's weights, handed over before every rollout.

The engine starts with a model of the student's shape and no weights. Full weights are handed over by vLLM's own
`reload_weights`, tensor by tensor, from the trainer's parameters; of a LoRA student the base goes over once and each
version's adapter is swapped in. On a GPU the engine sleeps while the trainer updates, and its memory is free.
"""

import gc
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from base.errors import UserError
from base.extras import require_vllm
from base.hashing import stable_hash
from stages.config.on_policy import OnPolicyConfig
from stages.model.policy import Policy, causal_lm
from stages.model.stop_strings import StopStrings
from stages.sampling.sampler import Gap, Sample, Sampling, parse_logprobs
from stages.vllm.handover import Probe, check_shapes, full_weights, weight_shapes
from stages.vllm.settings import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    barring,
    cpu_batch_tokens,
    cpu_cache_bytes,
    logprobs_mode,
    lora_rank,
    model_overrides,
    rows_at_a_time,
)
from stages.vllm.worker import EXTENSION

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
NAME = "vLLM in the trainer's process"


class VllmEngine:
    """A `Sampler` with an engine in this process.

    Args:
        policy: The student; its shape, not yet its weights.
        config: Lengths, temperature, number type and `sampler`.
        folder: For the shape's files and adapters.

    Raises:
        UserError: vLLM is not installed, cannot run on this device, or cannot tell the log-probabilities these
            settings need.
    """

    def __init__(self, policy: Policy, config: OnPolicyConfig, folder: Path) -> None:
        self.cuda = torch.cuda.is_available()
        require_vllm("sampler.backend", gpus=int(self.cuda))
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
        self.engine: Any = LLM(
            model=str(folder),
            load_format="dummy",
            hf_overrides=model_overrides(type(causal_lm(policy.model)).__name__),
            runner="generate",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=config.dtype,
            logprobs_mode=self.mode,
            max_num_seqs=rows_at_a_time(config),
            enforce_eager=not self.cuda,
            disable_log_stats=True,
            worker_extension_cls=EXTENSION,
            **self._memory(policy, config),
            **self._adapters(),
        )
        self._request: Any = None
        self._has_base = False
        self._version = 0
        self._fault: str | None = "no weights were handed over yet"
        # Whether a load failed, after which vLLM's layers are in no state to take another.
        self._damaged = False
        self._sleep()

    def _memory(self, policy: Policy, config: OnPolicyConfig) -> dict[str, Any]:
        if self.cuda:
            return {"gpu_memory_utilization": config.sampler.memory_share, "enable_sleep_mode": True}
        rows, shape = rows_at_a_time(config), causal_lm(policy.model).config.get_text_config()
        share = config.sampler.memory_share
        return {
            "kv_cache_memory_bytes": cpu_cache_bytes(shape, config.dtype, rows, config.max_new_tokens, share),
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": cpu_batch_tokens(shape.max_position_embeddings),
        }

    def _adapters(self) -> dict[str, Any]:
        if self.lora is None:
            return {}
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(self.lora)}

    def update_weights(self, policy: Policy, version: int) -> None:
        """Take over the policy's weights; what was cached of the weights before is dropped.

        Raises:
            UserError: the weights do not fit the engine's model, cannot be loaded, or give other log-probabilities
                than the policy's own forward; after a failed load the engine neither samples nor takes weights again.
        """
        if self._damaged:
            raise UserError(f"{NAME} takes no weights after a load that failed: {self._fault}")
        # What was there before is not what is asked for from here on.
        self._version, self._fault = version, "the last weights it was given did not fit"
        check_shapes(weight_shapes(policy), self.shapes, NAME)
        # A hand-over that ends early leaves part of two versions.
        self._damaged, self._fault = True, "a hand-over of weights did not end"
        probe = Probe.of(policy, self.config)
        try:
            scored = self._take(policy, version, probe)
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{NAME} cannot load the student's weights ({self._fault}); sample with sampler.backend: transformers"
            ) from error
        self._damaged, self._fault = False, "its log-probabilities were not the trainer's"
        probe.check(scored, NAME)
        self._fault = None

    def _take(self, policy: Policy, version: int, probe: Probe) -> list[float]:
        """Load the weights; returns the engine's log-probabilities of the probe's completion."""
        self._wake("weights")
        if self.lora is None or not self._has_base:
            self.engine.collective_rpc("take_weights", kwargs={"tensors": full_weights(policy)})
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
        asked = [{"prompt_token_ids": probe.tokens}]
        (answer,) = self.engine.generate(asked, [parameters], use_tqdm=False, lora_request=self._request)
        by_id = zip(answer.prompt_logprobs[probe.start :], probe.tokens[probe.start :], strict=True)
        return [float(known[token].logprob) for known, token in by_id]

    def _adapter(self, policy: Policy, version: int) -> Any:
        """A request's name for this version's adapter; the one before makes room for it."""
        from vllm.lora.request import LoRARequest

        if self._request is not None:
            self.engine.llm_engine.remove_lora(self._request.lora_int_id)
            shutil.rmtree(self._request.lora_path)
        folder = self.folder / f"adapter-{version}"
        assert isinstance(policy.model, PeftModel)
        policy.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
        # Ids begin with 1.
        return LoRARequest(f"student-{version}", version + 1, str(folder))

    def sample(
        self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Arguments and result as for `stages.sampling.sampler.sample`.

        Raises:
            UserError: a prompt with its completion does not fit the model's context, or `sampling` asks for
                log-probabilities of another kind than the engine was started for, or the last hand-over of weights
                failed.
        """
        from vllm import SamplingParams

        if self._fault is not None:
            raise UserError(f"{NAME} does not sample without the student's weights: {self._fault}")
        if sampling.temperature > 0 and logprobs_mode(sampling.temperature, sampling.top_p) != self.mode:
            raise UserError(f"the engine tells {self.mode}, which temperature {sampling.temperature} does not go with")
        if not prompts:
            self._sleep()
            return []
        check_context(prompts, sampling.max_new_tokens, int(self.engine.model_config.max_model_len))
        # Greedy completions of one prompt are all the same; vLLM refuses to draw several.
        drawn, copies = (group_size, 1) if sampling.temperature > 0 else (1, group_size)
        parameters = [
            SamplingParams(
                n=drawn,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                # The student's own, which need not be those of the model's config.
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
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self.engine.generate(asked, parameters, use_tqdm=False, lora_request=self._request)
        self._sleep()
        # The engine has no tokenizer, so completions are cut at stop strings once they are drawn.
        stop = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        return [
            [self._sample(prompt, output, stop) for output in sorted(answer.outputs, key=lambda o: o.index)] * copies
            for prompt, answer in zip(prompts, found, strict=True)
        ]

    def _sample(self, prompt: list[int], output: Any, stop: StopStrings | None) -> Sample:
        ids = list(output.token_ids)
        cut = None if stop is None else stop.length(ids)
        ids = ids[:cut]
        # A token's own log-probability comes first, the likeliest's may follow.
        logprobs = [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
        ended = cut is not None or (bool(ids) and ids[-1] in self.stop_ids)
        return Sample(prompt, ids, parse_logprobs(logprobs[: len(ids)], "vLLM"), ended, self._version)

    def drain_log(self) -> list[str]:
        """Nothing happens here that the caller does not see."""
        return []

    def logprob_gap(self) -> Gap | None:
        """None: the loop sees it in what is drawn, which always has the trainer's weights."""
        return None

    def close(self) -> None:
        """End the engine; its memory is free afterwards."""
        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sleep(self) -> None:
        """Leave the device's memory to the trainer: the cache, and weights that will be handed over anew."""
        if self.cuda:
            self.engine.sleep(level=1 if self._has_base and self.lora else 2)

    def _wake(self, part: str) -> None:
        if self.cuda:
            self.engine.wake_up(tags=[part])


def prompt_seed(seed: int, index: int) -> int:
    """A seed for each prompt of a rollout, of which vLLM makes one for each completion by counting on."""
    return int(stable_hash([seed, index])[:15], 16)


def check_context(prompts: Sequence[list[int]], max_new_tokens: int, limit: int) -> None:
    """See that all prompts leave room for their completions.

    Raises:
        UserError: one does not.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the engine's context of {limit} "
            f"tokens; lower max_new_tokens or shorten the domain's prompts"
        )
