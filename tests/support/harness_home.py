"""Tasks of lm-evaluation-harness over local files: a multiple-choice one and a generated one, shared by tests."""

import json
from pathlib import Path

QUESTIONS = [
    {"question": f"sort {number}:", "choices": choices, "gold": place % len(choices), "answer": "1"}
    for place, (number, choices) in enumerate(
        [
            ("5 3", ["3 5", "5", "a"]),
            ("9 1 4", ["zz", "1 4 9"]),
            ("2 8", ["q9", "(", "2 8"]),
            ("7 6", ["67", "abc"]),
            ("4 2 6", ["2", "x x", "%%%"]),
            ("1 3", ["13", "31"]),
            ("8 5", ["W", "5 8"]),
            ("6 1 2", ["1 2 6", "0", "!", "def "]),
        ]
    )
]
BOTH = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: " "
metadata: {{version: 1.0}}
"""
CHOICE = """task: choice
include: base_choice.yaml
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}]
"""
TEXT = """task: TASK
include: base_text.yaml
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list:
  - metric: exact_match
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks `choice`, `text` and `worse` (a metric that is better when lower) and their data."""
    folder.mkdir()
    for name in ("choice", "text"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        (folder / f"base_{name}.yaml").write_text(BOTH.format(data=f"{name}.jsonl"))
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "text.yaml").write_text(TEXT.replace("TASK", "text"))
    (folder / "worse.yaml").write_text(
        TEXT.replace("TASK", "worse") + "    higher_is_better: false\n    aggregation: mean\n"
    )
    return folder
