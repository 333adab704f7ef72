"""What the three programs share: their arguments, the data, and lines of progress."""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Progress(TrainerCallback):
    """Prints each log of the trainer as a JSON line, which becomes the stage's curve."""

    def __init__(self, first: int = 0, total: int | None = None) -> None:
        self.first, self.total = first, total

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        line = {"step": self.first + state.global_step, "total": self.total or state.max_steps, **numbers}
        print(json.dumps(line), flush=True)


def arguments() -> argparse.Namespace:
    """The places that the stage gives to the program."""
    parser = argparse.ArgumentParser()
    for name in ("start", "data", "out", "work", "teachers"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=100)
    return parser.parse_args()


def rows(data: Path, domain: str = "*") -> list[dict[str, Any]]:
    """The training examples of one domain, or of all."""
    files = sorted(data.glob(f"{domain}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def dataset(found: list[dict[str, Any]], *columns: str) -> Dataset:
    """Some columns of the rows; `answer` is the gold answer."""
    plain = [{**row, "answer": row["example"]["answer"]} for row in found]
    return Dataset.from_list([{column: row[column] for column in columns} for row in plain])


def checkpoint(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), tokenizer


def common_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Settings of all three trainers."""
    return {
        "output_dir": str(given.work),
        "seed": given.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
