"""A program of one's own as a stage: what it finds, what it may write, and how its faults are reported."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from base.errors import InfrastructureError, UserError
from base.store.journal import JOURNAL_FILE, read
from flows.engines.worker import INFRASTRUCTURE_FAULT, exit_code_of
from stages.command import run
from stages.config.command import CommandConfig, MergeCommandConfig
from stages.model.policy import load_policy
from stages.rows.trained_on import TrainedOn

# Moves every weight of the start by 0.5, and writes progress.
SHIFT = """
import json, os, shutil, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
start, out = map(Path, sys.argv[1:3])
print("epoch 1")
print(json.dumps({"step": 1, "total": 2, "loss": 3.0}))
print(json.dumps({"step": 2, "total": 2, "loss": 1.0}))
for name in ("config.json", "generation_config.json"):
    shutil.copy(start / name, out)
tensors = load_file(start / "model.safetensors")
save_file({name: value + 0.5 for name, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
"""
# Writes what the test has prepared.
COPY = "import shutil, sys; shutil.copytree(sys.argv[2], sys.argv[1], dirs_exist_ok=True)"


@pytest.fixture
def place(workspace, checkpoint, domains):
    """Make the workspace of a stage from random checkpoints."""

    def make(roles=("start",), names=("sort",), key: str = "expert", files=None):
        parents = {role: checkpoint(role.replace("/", "-"), number) for number, role in enumerate(roles)}
        made = workspace(key, parents, {name: domains[name] for name in names}, seed=3)
        made.provenance = {"stage": "command", "ingredients": {"files": files or {}}}
        return made

    return make


@pytest.fixture
def program(tmp_path: Path):
    """Make a config that runs a script."""

    def make(text: str, *words: str, schema=CommandConfig, **settings) -> CommandConfig:
        script = tmp_path / "program.py"
        script.write_text(text)
        arguments = ["{python}", str(script), *(words or ("{start}", "{out}"))]
        return schema(run=arguments, examples=5, max_steps=9, **settings)

    return make


def weights(artifact, store) -> dict[str, torch.Tensor]:
    return dict(load_policy(artifact, store).model.state_dict())


def test_what_the_program_writes_is_the_expert_and_its_lines_are_the_curve(place, program, store) -> None:
    made = place()
    artifact = run(program(SHIFT), made)
    before, after = weights(made.parents["start"], store), weights(artifact, store)
    assert all(torch.equal(after[name], before[name] + 0.5) for name in before)
    records = list(read(made.folder / JOURNAL_FILE))
    assert [r["values"] for r in records if r["kind"] == "metrics"] == [{"command/loss": 3.0}, {"command/loss": 1.0}]
    assert [(r["step"], r["total"]) for r in records if r["kind"] == "progress"] == [(1, 2), (2, 2)]
    assert artifact.manifest["metrics"] == {"loss": 1.0}
    assert TrainedOn.read(artifact).groups
    assert artifact.manifest["parameters"] == sum(
        v.numel() for v in dict(load_policy(artifact, store).model.named_parameters()).values()
    )
    assert not (made.folder / "program").exists()


def test_the_program_finds_its_data_and_places(place, program, domains) -> None:
    text = (
        SHIFT
        + """
work = Path(os.environ["MOPD_WORK"])
seen = {name: os.environ[f"MOPD_{name.upper()}"] for name in ("start", "data", "out", "seed", "max_steps")}
rows = [json.loads(line) for line in (Path(sys.argv[3]) / "sort.jsonl").read_text().splitlines()]
Path(sys.argv[4]).write_text(json.dumps([seen, rows, os.getcwd(), "PYTHONSAFEPATH" in os.environ]))
"""
    )
    made, seen = place(), Path(program("").run[1]).with_name("seen.json")
    run(program(text, "{start}", "{out}", "{data}", str(seen)), made)
    places, rows, folder, safe = json.loads(seen.read_text())
    assert (places["seed"], places["max_steps"], Path(folder).name, safe) == ("3", "9", "work", False)
    drawn = domains["sort"].draw_up_to(5, "train", 3)
    assert [row["example"]["answer"] for row in rows] == [example.answer for example in drawn]
    assert rows[0]["prompt"] == [{"role": "user", "content": drawn[0].prompt}] or rows[0]["prompt"] == drawn[0].prompt
    assert rows[0]["domain"] == "sort"


def test_a_merge_finds_each_domains_teachers_with_their_weights_once(place, program) -> None:
    roles = ("start", "teacher/sort/one", "teacher/sort/two", "teacher/reverse")
    made, seen = place(roles, ("sort", "reverse"), "student"), Path(program("").run[1]).with_name("seen.json")
    made.parents = {**made.parents, "teacher/reverse": made.parents["teacher/sort/one"]}
    text = (
        SHIFT
        + """
Path(sys.argv[4]).write_text(Path(sys.argv[3]).read_text())
load_file(json.loads(Path(sys.argv[3]).read_text())["sort"][1]["path"] + "/model.safetensors")
"""
    )
    config = program(
        text, "{start}", "{out}", "{teachers}", str(seen),
        schema=MergeCommandConfig, teacher_weights={"sort": {"one": 0.25, "two": 0.75}},
    )  # fmt: skip
    run(config, made)
    table = json.loads(seen.read_text())
    assert [entry["weight"] for entry in table["sort"]] == [0.25, 0.75]
    assert table["reverse"] == [{"path": table["sort"][0]["path"], "weight": 1.0}]


def adapter_of(folder: str) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def test_an_adapter_of_the_start_is_merged_into_it(place, program, store, tmp_path: Path) -> None:
    made = place()
    adapter_of(made.parents["start"].uri).save_pretrained(tmp_path / "adapter")
    found = weights(run(program(COPY, "{out}", str(tmp_path / "adapter")), made), store)
    expected = adapter_of(made.parents["start"].uri).merge_and_unload().state_dict()
    before = weights(made.parents["start"], store)
    assert any(not torch.equal(found[name], before[name]) for name in before)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_another_tokenizer_is_refused(place, program, store, tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    made, folder = place(), tmp_path / "other"
    load_policy(made.parents["start"], store).model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="</s>").save_pretrained(folder)
    with pytest.raises(UserError, match="changed the tokenizer"):
        run(program(COPY, "{out}", str(folder)), made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('no such column'); sys.exit(3)", "ended with 3: no such column"),
        ("", "ended without writing to {out}"),
        ("import sys; open(sys.argv[2] + '/notes.txt', 'w').write('x')", "no config.json"),
    ],
)
def test_a_program_that_fails_or_writes_something_else_is_a_users_error(place, program, store, text, message) -> None:
    made = place()
    with pytest.raises(UserError, match=message):
        run(program(text), made)
    assert store.find(made.key) is None


def test_a_program_that_does_not_exist_is_named(place) -> None:
    with pytest.raises(UserError, match="expert: nosuchprogram: no such program"):
        run(CommandConfig(run=["nosuchprogram", "{out}"]), place())


def test_a_file_that_changed_since_the_plan_is_named(place, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("print()")
    config = CommandConfig(run=[sys.executable, str(file), "{out}"], files=[str(file)])
    with pytest.raises(UserError, match=r"own\.py has changed since the run was planned"):
        run(config, place(files={"own.py": "0"}))


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(75)"])
def test_a_killed_program_is_tried_again_and_finds_what_it_had_saved(place, program, store, end) -> None:
    text = (
        f"""
import os, sys
from pathlib import Path
saved = Path(os.environ["MOPD_WORK"]) / "state"
if not saved.exists():
    saved.write_text("7")
    {end}
assert saved.read_text() == "7" and not any(Path(sys.argv[2]).iterdir())
"""
        + SHIFT
    )
    made, config = place(), program(text)
    with pytest.raises(InfrastructureError) as caught:
        run(config, made)
    assert exit_code_of(caught.value) == INFRASTRUCTURE_FAULT
    assert run(config, made) == store.find(made.key)
