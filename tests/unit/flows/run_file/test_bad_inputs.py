"""Bad values and run files, through the command line: one message that names the key or the file, exit code 2, and
nothing started.

Each case is a line of a table and runs in this process. Checkpoints, data and damaged homes have tables of their own;
what a subprocess alone can show stands in `tests/integration/cli/test_bad_input.py`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.desk import FEW, RL, RUN, Desk, Value
from tests.unit.flows.run_file.test_config import MINIMAL

pytestmark = pytest.mark.slow


def at(key: str, value: object, *said: str) -> Value:
    """A value that its key's schema refuses."""
    return Value(f"{key}={value if isinstance(value, str) else json.dumps(value)}", (key, *said))


VALUES = [
    at("seeds", [0, 0], "0 is named twice"),
    at("seeds", [-1], "greater than or equal to 0"),
    at("seeds", "[12345678901234567890123]", "less than 4294967296"),
    at("seeds", []),
    at("seeds", "[a]"),
    at("seeds", list(range(200)), "at most 100"),
    at("name", "''"),
    at("name", "../up"),
    at("name", "x" * 300, "at most 100 characters"),
    at("name", "'two\nlines'"),
    at("name", "null"),
    at("base.pretrain.domains", [], "the list is empty"),
    at("base.pretrain.domains", ["sort", "sort"], "'sort' is named twice"),
    at("base.pretrain.domains", "every", "write `all`, or a list of names"),
    at("base.pretrain.domains", [1], "is no name"),
    at("cold_start.sft.domains", [], "the list is empty"),
    at("evaluate.domains", [], "the list is empty"),
    at("evaluate.expert_panel", ["sort", "sort"], "'sort' is named twice"),
    at("notify", {"events": []}, "notify.events"),
    at("notify", {"events": ["failure", "failure"]}, "notify.events: 'failure' is named twice"),
    Value("base={gguf: ''}", ("base.gguf",)),
    Value("experts={a: {domain: sort, checkpoint: ''}}", ("experts.a.checkpoint",)),
    Value("merge.teachers={}", ("merge.teachers", "at least 1 item")),
    at("merge.domains", [], "the list is empty"),
    at("merge.domains", ["sort", "sort"], "named twice"),
    at("merge.anchor.domains", ["general", "general"], "named twice"),
    at("base.pretrain.batch_tokens", 10**12, "less than or equal to 16777216"),
    at("base.pretrain.max_steps", 0),
    at("base.pretrain.max_steps", 10**9),
    at("base.pretrain.max_steps", "true", "a number is expected, not true"),
    at("base.pretrain.max_steps", 1.5),
    at("base.pretrain.max_steps", "1.0e400"),
    at("base.pretrain.examples", 10**12),
    at("base.pretrain.micro_batch_tokens", -1),
    at("base.pretrain.examples", "yes", "a number is expected"),
    Value("base.pretrain.model.heads=7", ("base.pretrain.model: hidden_size: 128 is no multiple of 2 * heads (14)",)),
    Value("base.pretrain.model={hidden_size: 1, heads: 1}", ("base.pretrain.model: hidden_size: 1 is no multiple of",)),
    at("base.pretrain.model.hidden_size", 10**9, "less than or equal to 32768"),
    at("base.pretrain.model.layers", 10**9, "less than or equal to 1000"),
    at("base.pretrain.model.heads", 0),
    at("base.pretrain.model.max_length", 1),
    at("base.pretrain.optimizer.learning_rate", "1.0e30", "less than or equal to 1"),
    at("base.pretrain.optimizer.learning_rate", 0),
    at("base.pretrain.optimizer.learning_rate", ".nan", "finite number"),
    at("base.pretrain.optimizer.betas", [1, 0.9], "less than 1"),
    at("base.pretrain.optimizer.betas", [-0.5, 0.9], "greater than or equal to 0"),
    at("base.pretrain.optimizer.betas", [0.9]),
    at("base.pretrain.optimizer", {"learning_rate": 0.5, "weight_decay": 5}, "removes the whole weight in each step"),
    at("base.pretrain.optimizer.warmup_steps", -1),
    at("base.pretrain.optimizer.schedule", "cosin", "'constant', 'linear' or 'cosine'"),
    at("cold_start.sft.batch_size", 10**9),
    at("cold_start.sft.lora", {"rank": 0}),
    at("cold_start.sft.lora", {"rank": 10**9}),
    at("cold_start.sft.lora", {"dropout": 1}, "less than 1"),
    at("cold_start.sft.lora", {"target_modules": []}, "the list is empty"),
    at("cold_start.sft.lora", {"target_modules": ""}, "all-linear"),
    at("cold_start.sft.lora", {"target_modules": "q_proj("}, "no regular expression"),
    at(f"{RL}.group_size", 1, "greater than or equal to 2"),
    at(f"{RL}.group_size", 10**9),
    at(f"{RL}.prompts_per_step", 10**9),
    at(f"{RL}.max_new_tokens", 10**9),
    at(f"{RL}.temperature", 0),
    at(f"{RL}.temperature", "1.0e-30"),
    at(f"{RL}.temperature", 1000),
    at(f"{RL}.top_p", 0),
    at(f"{RL}.top_p", 1.5),
    at(f"{RL}.updates_per_batch", 10**9),
    at(f"{RL}.reference_kl", "1.0e30"),
    at(f"{RL}.clip_low", 1),
    at(f"{RL}.sampler.timeout_seconds", "1.0e30"),
    at(f"{RL}.sampler.retries", -1),
    at(f"{RL}.health.max_mismatch", 0),
    at(f"{RL}.longer_prompts", "cut"),
    at("merge.rounds", 1_000_000, "less than or equal to 100"),
    at("merge.rounds", 0),
    at("merge", {"rounds": 100, "variants": {"a": {"rounds": 2}}}, "merge.variants.a.rounds: set this in merge"),
    Value(
        "merge.objective=reverse_lk", ("merge.objective.type: unknown type 'reverse_lk' — did you mean 'reverse_kl'",)
    ),
    Value("merge.objective={type: jds}", ("merge.objective.type: unknown type 'jds' — did you mean 'jsd'",)),
    Value("merge.objective={beta: 0.5}", ("merge.objective.type: missing; one of reverse_kl, forward_kl, jsd",)),
    Value("merge.objective.beta=0.5", ("merge.objective.type: missing; one of reverse_kl, forward_kl, jsd",)),
    Value("merge.objective=5", ("merge.objective.type: missing; one of reverse_kl",)),
    Value(
        "merge.objective={type: reverse_kl, beta: 0.5}",
        ("merge.objective.beta: belongs to jsd; the type is reverse_kl",),
    ),
    Value("merge.objective={type: jsd, betta: 0.5}", ("merge.objective.betta: unknown key — did you mean 'beta'",)),
    Value(
        "merge.objective={type: imitation, top_k: {}}", ("merge.objective.top_k: belongs to reverse_kl, forward_kl",)
    ),
    Value(
        "merge.objective={type: jsd, importance_band: [2, 1]}",
        ("merge.objective.importance_band: must be [low, high] with 0 <= low < 1 < high",),
    ),
    Value("merge.objective={type: jsd, extrapolation: 1.0e30}", ("merge.objective.extrapolation: ",)),
    Value("merge.objective={type: jsd, top_k: {k: 0}}", ("merge.objective.top_k.k: Input should be greater than 0",)),
    Value(
        "merge.objective={type: jsd, top_k: {suport: student}}",
        ("merge.objective.top_k.suport: unknown key — did you mean 'support'",),
    ),
    Value("merge.objective={type: python, path: mine.py}", ("merge.objective.path: '", "is not FILE.py:FUNCTION")),
    Value("merge.variants={a: {objective: jds}}", ("merge.variants.a.objective.type: unknown type 'jds'",)),
    Value(
        "merge.variants={a: {objective: {type: jsd, entropy_threshold: 1}}}",
        ("merge.variants.a.objective.entropy_threshold: belongs to entropy_aware; the type is jsd",),
    ),
    at("merge.domain_weights", {"sort": 0}),
    at("merge.domain_weights", {"sort": "1.0e300"}),
    at("merge.domain_weights", {"nobody": 1}, "unknown domain of the merge 'nobody'"),
    at("merge.teachers", {"sort": {}}, "name an expert"),
    at("merge.teachers", {"sort": "nobody"}, "unknown expert 'nobody'"),
    at("merge.baselines", ["tise"], "did you mean 'ties'"),
    at("merge.baselines", {"ties": {"density": 0}}, "density"),
    at("merge.baselines", {"ties": {"scale": "1.0e30"}}, "scale"),
    at("merge.variants", {"../up": {}}, "a name is made of letters"),
    at("merge.variants", {"low": {"max_step": 1}}, "merge.variants.low.max_step"),
    at("evaluate.samples", 10**9),
    at("evaluate.examples", 0),
    at("evaluate.temperature", 0),
    at("gate.confidence", 0),
    at("gate.confidence", 1),
    at("gate.non_inferiority_margin", 0),
    at("resources.gpus", -1),
    at("resources.gpus", 10**9),
    at("resources.gpus", "true", "a number is expected"),
    at("resources.timeout_minutes", 0),
    at("resources.threads", 10**9),
    at("resources.rollout_servers.urls", ["ftp://x"], "is not an address"),
    at("chat_template_kwargs", {"messages": []}, "is set by the stages"),
    at("notify", {"webhook_env": "https://a.b/c"}, "notify.webhook_env"),
    at("domains", {"": {"kind": "strings", "options": {"task": "sort"}}}, "''", "a name is made of letters"),
    at("domains", {"a/b": {"kind": "strings", "options": {"task": "sort"}}}, "'a/b'"),
    at("domains.sort.kind", "strngs", "did you mean 'strings'"),
    at("domains.sort.options.task", "srot"),
    at("domains.sort.options.min_length", 10**9),
    at("domains.sort.options.held_out_share", ".nan"),
    at("domains.general", {"kind": "reasoning", "options": {"tasks": {}}}, "domains.general.options.tasks"),
    at("domains.general", {"kind": "code_edit", "options": {"timeout_seconds": ".inf"}}, "timeout_seconds"),
]
NAMES = ["", "..", "a@0", "a/b", "two\nlines", " a", "a.", "<img src=x>", "a|b", "x" * 300, "-rf", "a=b", "a:b"]
OTHER_OVERRIDES = [
    Value("nonsense", ("override 'nonsense': write KEY=VALUE",)),
    Value("=1", ("write KEY=VALUE",)),
    Value("a..b=1", ("is no dotted key",)),
    Value(f"{'a.' * 2000}b=1", ("is no dotted key",)),
    Value("name.x=1", ("'name' is not a mapping",)),
    Value("seeds=[1", ("not valid YAML",)),
    Value("seeds={a: 1, a: 2}", ("the key 'a' is repeated",)),
    Value(f"seeds={'[' * 5000}", ("nested more than 50 deep",)),
    Value(f"seeds=[{'9' * 5000}]", ("not valid YAML",)),
    Value("seeds=2024-13-45", ("not valid YAML",)),
    Value("merge={on: 1}", ("merge.True: a key is text; put it in quotes",)),
    Value("chat_template_kwargs={a: &a [*a]}", ("an alias contains itself",)),
    Value('chat_template_kwargs={a: "\\0"}', ("chat_template_kwargs.a", "a character that is no text")),
    Value('name="\\ud800"', ("name", "a character that is no text")),
    Value("mergee={}", ("mergee: unknown key — did you mean 'merge'",)),
    Value(f"{RL}.group_sise=3", (f"{RL}.group_sise: unknown key — did you mean 'group_size'",)),
    Value("experts.sort.domain=srt", ("experts.sort.domain: unknown domain 'srt' — did you mean 'sort'",)),
    Value("experts.sort.start_from=cold_strat", ("unknown checkpoint 'cold_strat'",)),
    Value("base={}", ("base: give exactly one of pretrain, checkpoint, gguf",)),
    Value("base={checkpoint: ./nowhere}", ("base.checkpoint: ./nowhere: no such directory",)),
    Value("base={checkpoint: ''}", ("base.checkpoint: the value is empty",)),
    Value("base={checkpoint: '~nobody-here/x'}", ("base.checkpoint: ~nobody-here/x",)),
    Value("base={checkpoint: .}", ("base.checkpoint: .: not a Hugging Face checkpoint",)),
    Value("base={checkpoint: some/model}", ("base.checkpoint: 'some/model' is not a local directory",)),
    Value("base={checkpoint: some/model, revision: 2024-01-01}", ("base.revision",)),
    Value("base={gguf: nowhere.gguf}", ("base.gguf: nowhere.gguf: no such file",)),
    Value("base={gguf: run.yaml}", ("base.gguf: run.yaml: no such file",)),
    Value("base={gguf: /dev/null}", ("base.gguf: /dev/null",)),
    Value("base={gguf: 'package://no_such/x.gguf'}", ("base.gguf: package 'no_such' is not installed",)),
    Value("base={gguf: 'package://no.such/x.gguf'}", ("base.gguf: package 'no.such' is not installed",)),
    Value("domains.general.kind=nowhere.py", ("domains.general.kind", "nowhere.py: no such file")),
    Value("experts={student: {domain: sort, train: {sft: {}}}}", ("experts.student: the name is taken",)),
    Value("experts={harness: null}", ("experts.harness",)),
]


def test_all_unknown_names_come_in_one_message(desk: Desk) -> None:
    desk.write(RUN)
    wrong = ["experts.sort.domain=srt", "domains.sort.kind=stings", "merge.teachers={reverse: revrse}"]
    names = ("kind 'stings' — did you mean 'strings'", "domain 'srt' — did you mean 'sort'", "mean 'reverse'")
    desk.refuses("run", *wrong, names=names)
    names = ("domains.sort.options.tsk: unknown key — did you mean 'task'", "domains.reverse.options.tusk: unknown key")
    desk.refuses("run", "domains.sort.options.tsk=1", "domains.reverse.options.tusk=1", names=names)


def test_every_domain_needs_exactly_one_teacher(desk: Desk) -> None:
    desk.write(RUN)
    lonely = ["domains.spare={kind: strings, options: {task: rotate}}", "merge.domains=[sort, spare]"]
    desk.refuses("run", *lonely, names=("domain 'spare' has no teacher; route it in merge.teachers",))
    twins = "experts.twin={domain: sort, train: {sft: {}}}"
    desk.write(RUN | {"experts": {"one": FEW["experts"]["sort"], "reverse": FEW["experts"]["reverse"]}})
    desk.refuses("run", twins, names=("merge.teachers: domain 'sort' has 2 experts (one, twin); name one",))


def test_a_broken_gguf_file_is_found_by_the_plan(desk: Desk) -> None:
    desk.write(RUN)
    broken = desk.folder / "broken.gguf"
    for content, name in ((b"no weights", "not a GGUF file"), (b"GGUF" + b"\xff" * 60, "not readable as a GGUF file")):
        broken.write_bytes(content)
        desk.refuses("plan", "--check", f"base={{gguf: {broken}}}", names=(f"base.gguf: {broken}: {name}",))


@pytest.mark.parametrize("value", VALUES + OTHER_OVERRIDES, ids=lambda value: value.override[:60])
def test_a_value_is_refused_by_its_key(desk: Desk, value: Value) -> None:
    desk.write(RUN)
    desk.refuses("run", value.override, names=value.names)


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("section", ["experts", "domains"])
def test_a_name_that_no_file_or_page_could_hold_is_refused(desk: Desk, section: str, name: str) -> None:
    entry = FEW["experts"]["sort"] if section == "experts" else MINIMAL["domains"]["sort"]
    desk.write(RUN | {section: RUN[section] | {name: entry}})
    desk.refuses("plan", names=(f"{section}.{name!r:.40}"[:40], "a name"))


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "empty": ("", ("a run file is a mapping of keys",)),
    "a list": ("[1, 2]", ("a run file is a mapping of keys",)),
    "a number": ("7", ("a run file is a mapping of keys",)),
    "half": ("name: [", ("not valid YAML",)),
    "tabs": ("name:\n\t- x", ("not valid YAML",)),
    "a null byte": ("name: a\0b", ("not valid YAML",)),
    "an unknown tag": ("name: !!python/object/apply:os.system [id]", ("not valid YAML",)),
    "aliases that multiply": (BOMB, ("more than 100,000 values",)),
    "merges that multiply": (MERGES, ("more than 100,000 values",)),
    "an alias of itself": ("name: &a [*a]", ("an alias contains itself",)),
    "an alias of nothing": ("name: *nobody", ("undefined alias",)),
    "deep brackets": (f"name: {'[' * 20_000}", ("nested more than 50 deep",)),
    "deep dashes": (f"name:\n  {'- ' * 20_000}x", ("nested more than 50 deep",)),
    "a key twice": ("name: a\nmerge: {}\nmerge: {}\n", ("the key 'merge' is repeated", "lines 2 and 3")),
    "an inner key twice": ("merge:\n  max_steps: 1\n  max_steps: 2\n", ("the key 'max_steps' is repeated",)),
    "a key of another type": ("on: 1", ("True: a key is text",)),
    "a date that is none": ("name: 2024-13-45", ("month must be in 1..12",)),
    "two documents": ("name: a\n---\nname: b\n", ("not valid YAML",)),
    "too long": ("#" * (2**20 + 1), ("has 1,048,577 bytes, the limit is 1,048,576",)),
    "extends itself": ("extends: run.yaml", ("extends this file in turn",)),
    "extends a list": ("extends: [a.yaml]", ("extends: name one run file",)),
    "extends a folder": ("extends: .", ("is a folder, not a file",)),
    "extends a device": ("extends: /dev/zero", ("/dev/zero: is not a regular file",)),
    "extends nothing": ("extends: nowhere.yaml", ("nowhere.yaml: no such run file",)),
    "extends a null byte": ('extends: "a\\0b"', ("a character that is no text",)),
    "extends a long name": (f"extends: {'x' * 5000}", ("x", "cannot be read: File name too long")),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_run_file_that_is_none_is_refused(desk: Desk, case: str) -> None:
    text, names = TEXTS[case]
    desk.write(text)
    desk.refuses("run", names=names)


def _folder(path: Path) -> None:
    path.mkdir()


def _bytes(path: Path) -> None:
    path.write_bytes(b"name: \xff\xfe")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _chain(path: Path) -> None:
    for number in range(1200):
        path.with_name(f"run{number}.yaml").write_text(f"extends: run{number + 1}.yaml")
    path.write_text("extends: run0.yaml")


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "no such run file"),
    "a folder": (_folder, "is a folder, not a file"),
    "no text": (_bytes, "is not UTF-8 text"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a link to itself": (_loop, "cannot be read"),
    "a device": (_device, "is not a regular file"),
    "a chain": (_chain, "more than 20 run files extend one another"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_holds_no_run_file_is_refused(desk: Desk, case: str) -> None:
    make, name = PLACES[case]
    make(desk.file)
    desk.refuses("plan", names=("run", name))
