"""An expert by TRL's GRPOTrainer, as a stage of a run; the reward is an exact match of the gold answer."""

from typing import Any

from common import Progress, arguments, checkpoint, common_settings, dataset, rows
from trl import GRPOConfig, GRPOTrainer


def exact(completions: list[Any], answer: list[str], **rest: Any) -> list[float]:
    """1 where a completion is the gold answer, else 0."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [float(text.strip() == gold) for text, gold in zip(texts, answer, strict=True)]


if __name__ == "__main__":
    given = arguments()
    model, tokenizer = checkpoint(given.start)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=exact,
        args=GRPOConfig(
            **common_settings(given),
            max_steps=given.max_steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=12,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            beta=0.0,
        ),
        train_dataset=dataset(rows(given.data), "prompt", "answer"),
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.train()
    trainer.save_model(str(given.out))
