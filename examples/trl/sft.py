"""An expert by TRL's SFTTrainer, as a stage of a run."""

from common import Progress, arguments, checkpoint, common_settings, dataset, rows
from trl import SFTConfig, SFTTrainer

if __name__ == "__main__":
    given = arguments()
    model, tokenizer = checkpoint(given.start)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common_settings(given),
            max_steps=given.max_steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
        ),
        train_dataset=dataset(rows(given.data), "prompt", "completion"),
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.train()
    trainer.save_model(str(given.out))
