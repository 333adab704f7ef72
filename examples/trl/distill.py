"""A merge by TRL's DistillationTrainer, as a stage of a run.

The trainer takes one teacher, so the teachers of the domains take turns.
"""

import json

from common import Progress, arguments, checkpoint, common_settings, dataset, rows
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

ROUNDS = 2

if __name__ == "__main__":
    given = arguments()
    model, tokenizer = checkpoint(given.start)
    teachers = json.loads(given.teachers.read_text())
    turns = [(domain, teachers[domain]) for _ in range(ROUNDS) for domain in sorted(teachers)]
    steps = max(1, given.max_steps // len(turns))
    for number, (domain, (teacher, *_)) in enumerate(turns):
        trainer = DistillationTrainer(
            model=model,
            teacher_model=AutoModelForCausalLM.from_pretrained(teacher["path"], dtype="float32"),
            args=DistillationConfig(
                **common_settings(given),
                max_steps=steps,
                per_device_train_batch_size=24,
                max_completion_length=12,
                beta=1.0,
                learning_rate=5e-4,
                lr_scheduler_type="constant",
            ),
            train_dataset=dataset(rows(given.data, domain), "prompt"),
            processing_class=tokenizer,
            callbacks=[Progress(number * steps, len(turns) * steps)],
        )
        trainer.train()
        model = trainer.model
    trainer.save_model(str(given.out))
