"""The config of an evaluation: how one checkpoint is scored on one domain and split. Free of torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.config.on_policy import OnPolicyConfig, SamplerConfig, temperature_fault, vllm_reports
from stages.config.training import (
    FLOAT32_MATMUL,
    STOP,
    Float32Matmul,
    LoraConfig,
    NewTokens,
    Positive,
    Rows,
    StopList,
    StrictModel,
    Temperature,
)

# Share of a device's memory for the weights and cache of an engine; the checkpoint's own model lies beside it.
ENGINE_SHARE = 0.5


class EvaluationConfig(StrictModel):
    """The settings with which one checkpoint is scored on one domain and split."""

    examples: Positive = Field(400, description="Held-out examples of each domain; all if its data have fewer.")
    samples: int = Field(4, ge=0, le=10_000, description="Sampled completions per example, besides the greedy one.")
    temperature: Temperature = Field(1.0, description="Temperature of the sampled completions.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus threshold of the sampled completions.")
    stop: StopList = Field((), description=STOP)
    max_new_tokens: NewTokens = Field(64, description="Longest completion.")
    batch_size: Rows = Field(256, description="Sequences sampled together; decides which random numbers each gets.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number type of products, in the shift and in tasks of lm-evaluation-harness too; logits stay "
        "float32.",
    )
    float32_matmul: Float32Matmul = Field("highest", description=FLOAT32_MATMUL)
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="The sampler of the completions: transformers, or vLLM in the evaluation's process, which pays "
        "where sampling takes minutes.",
    )

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        if self.backend == "transformers" or not self.samples:
            return self
        if fault := temperature_fault(self.temperature, self.backend, "backend: transformers"):
            raise ValueError(fault)
        if not vllm_reports(self.temperature, self.top_p):
            raise ValueError(
                f"top_p: vLLM takes {self.top_p:g} at temperature 1 only, since it reports log-probabilities before "
                f"top_p there alone; set temperature or top_p to 1, or backend: transformers"
            )
        return self

    def engine(self, lora: LoraConfig | None) -> OnPolicyConfig:
        """The settings of a vLLM engine that draws the completions.

        Args:
            lora: The shape of the checkpoint's adapter; None for a full checkpoint.
        """
        # Without sampled completions their temperature and top-p are not used.
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.samples else {}
        return OnPolicyConfig(
            **drawn,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            prompts_per_step=self.batch_size,
            group_size=1,
            dtype=self.dtype,
            float32_matmul=self.float32_matmul,
            lora=lora,
            sampler=SamplerConfig(backend="vllm", memory_share=ENGINE_SHARE),
        )
