"""Bad input through the command line: one message that names the key or the file, exit code 2, and nothing started.

Each case is a line of a table and runs in this process. What a subprocess alone can show stands in
`tests/integration/test_bad_input.py`.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner, Result

from flows import session
from flows.cli import app
from tests.numerics.conftest import tiny_policy
from tests.unit.test_config import MINIMAL

MISTAKE = 2
FEW = {
    "base": {"pretrain": {"max_steps": 5, "examples": 20}},
    "cold_start": {"sft": {"max_steps": 5, "examples": 20}},
    "experts": {
        "sort": {"domain": "sort", "train": {"rl": {"max_steps": 5, "examples": 20}}},
        "reverse": {"domain": "reverse", "train": {"sft": {"max_steps": 5, "examples": 20}}},
    },
    "merge": {"max_steps": 5, "examples": 20, "anchor": {"domains": ["general"]}},
    "evaluate": {"shift": None, "examples": 5},
}
RUN: dict[str, Any] = MINIMAL | FEW
# A checkpoint from elsewhere, and one expert.
IMPORTED: dict[str, Any] = {
    "name": "tiny",
    "base": {"checkpoint": "given"},
    "domains": {"sort": {"kind": "strings", "options": {"task": "sort"}}},
    "experts": {"sort": {"domain": "sort", "train": {"sft": {"max_steps": 1, "examples": 5, "batch_size": 1}}}},
    "evaluate": {"shift": None, "examples": 5},
}
# What a run that starts something leaves in its home.
TRACES = ("work", "servers", "prefect.db", "mlflow.db", "mlflow", "prefect", "runs/tiny")


class Desk:
    """A folder with a run file and a home of which nothing is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "run.yaml"
        self.home = folder / "home"

    def write(self, run: Any) -> None:
        self.file.write_text(run if isinstance(run, str) else yaml.safe_dump(run, sort_keys=False))

    def call(self, *arguments: str) -> Result:
        command, *others = arguments
        return CliRunner().invoke(app, [command, str(self.file), *others, "--home", str(self.home)])

    def refuses(self, *arguments: str, names: tuple[str, ...]) -> None:
        """See that a command ends with exit code 2 and one message that holds all names, and leaves no trace."""
        done = self.call(*arguments)
        said = done.stderr
        assert done.exit_code == MISTAKE, (done.exit_code, done.exception, said)
        assert isinstance(done.exception, SystemExit)
        assert said.count("error: ") == 1 and "Traceback" not in said, said
        for name in names:
            assert name in said, said
        if self.home.is_dir():
            left = [trace for trace in TRACES if (self.home / trace).exists()]
            assert left == [] and list((self.home / "store").iterdir()) == []


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk at which nothing may start a server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MOPD_HOME", raising=False)
    monkeypatch.setattr(session, "prefect_session", lambda *_: pytest.fail("Prefect was started"))
    return Desk(tmp_path)


class Value(NamedTuple):
    """An override, and what its message names."""

    override: str
    names: tuple[str, ...]


def at(key: str, value: object, *said: str) -> Value:
    """A value that its key's schema refuses."""
    return Value(f"{key}={value if isinstance(value, str) else json.dumps(value)}", (key, *said))


RL = "experts.sort.train.rl"
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
    at("merge.domains", [], "the list is empty"),
    at("merge.domains", ["sort", "sort"], "named twice"),
    at("merge.anchor.domains", ["general", "general"], "named twice"),
    at("base.pretrain.batch_tokens", 10**12, "less than or equal to 16777216"),
    at("base.pretrain.max_steps", 0),
    at("base.pretrain.max_steps", 10**9),
    at("base.pretrain.max_steps", "true", "a number is wanted, not true"),
    at("base.pretrain.max_steps", 1.5),
    at("base.pretrain.max_steps", "1.0e400"),
    at("base.pretrain.examples", 10**12),
    at("base.pretrain.micro_batch_tokens", -1),
    at("base.pretrain.prompt_weight", "yes", "a number is wanted"),
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
    at("base.pretrain.optimizer", {"learning_rate": 0.5, "weight_decay": 5}, "takes all of a weight at each step"),
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
    at(f"{RL}.health.max_length_growth", 1),
    Value(f"{RL}.domain_shares={{sort: 1}}", (f"{RL}: domain_shares belongs to loss_normalisation: domain",)),
    at(f"{RL}.longer_prompts", "cut"),
    at("merge.rounds", 1_000_000, "less than or equal to 100"),
    at("merge.rounds", 0),
    at("merge.objective", "reverse_lk"),
    Value("merge.objective.importance_band=[2, 1]", ("merge.objective: importance_band must be [low, high]",)),
    at("merge.objective.extrapolation", "1.0e30"),
    at("merge.objective.top_k", {"k": 0}),
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
    at("resources.gpus", "true", "a number is wanted"),
    at("resources.timeout_minutes", 0),
    at("resources.threads", 10**9),
    at("resources.rollout_servers.urls", ["ftp://x"], "is no address"),
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
    Value("seeds={a: 1, a: 2}", ("the key 'a' stands twice",)),
    Value(f"seeds={'[' * 5000}", ("nested more than 50 deep",)),
    Value(f"seeds=[{'9' * 5000}]", ("not valid YAML",)),
    Value("seeds=2024-13-45", ("not valid YAML",)),
    Value("merge={on: 1}", ("merge.True: a key is text; put it in quotes",)),
    Value("chat_template_kwargs={a: &a [*a]}", ("an alias holds itself",)),
    Value('chat_template_kwargs={a: "\\0"}', ("chat_template_kwargs.a", "a character that is no text")),
    Value('name="\\ud800"', ("name", "a character that is no text")),
    Value("mergee={}", ("mergee: unknown key — did you mean 'merge'",)),
    Value(f"{RL}.group_sise=3", (f"{RL}.group_sise: unknown key — did you mean 'group_size'",)),
    Value("experts.sort.domain=srt", ("experts.sort.domain: unknown domain 'srt' — did you mean 'sort'",)),
    Value("experts.sort.start_from=cold_strat", ("unknown checkpoint 'cold_strat'",)),
    Value("base={}", ("base: give exactly one of pretrain, checkpoint, gguf",)),
    Value("base={checkpoint: ./nowhere}", ("base.checkpoint: ./nowhere: no such directory",)),
    Value("base={checkpoint: ''}", ("base.checkpoint: it is empty",)),
    Value("base={checkpoint: '~nobody-here/x'}", ("base.checkpoint: ~nobody-here/x",)),
    Value("base={checkpoint: .}", ("base.checkpoint: .: not a Hugging Face checkpoint",)),
    Value("base={checkpoint: some/model}", ("base.checkpoint: 'some/model' is not a local directory",)),
    Value("base={checkpoint: some/model, revision: 2024-01-01}", ("base.revision",)),
    Value("base={gguf: nowhere.gguf}", ("base.gguf: nowhere.gguf: no such file",)),
    Value("base={gguf: /dev/null}", ("base.gguf: /dev/null",)),
    Value("base={gguf: 'package://no_such/x.gguf'}", ("base.gguf: package 'no_such' is not installed",)),
    Value("base={gguf: 'package://no.such/x.gguf'}", ("base.gguf: package 'no.such' is not installed",)),
    Value("domains.general.kind=nowhere.py", ("domains.general.kind", "nowhere.py: no such file")),
    Value("experts={student: {domain: sort, train: {sft: {}}}}", ("experts.student: the name is taken",)),
    Value("experts={harness: null}", ("experts.harness",)),
]


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
    "an alias of itself": ("name: &a [*a]", ("an alias holds itself",)),
    "an alias of nothing": ("name: *nobody", ("undefined alias",)),
    "deep brackets": (f"name: {'[' * 20_000}", ("nested more than 50 deep",)),
    "deep dashes": (f"name:\n  {'- ' * 20_000}x", ("nested more than 50 deep",)),
    "a key twice": ("name: a\nmerge: {}\nmerge: {}\n", ("the key 'merge' stands twice", "lines 2 and 3")),
    "an inner key twice": ("merge:\n  max_steps: 1\n  max_steps: 2\n", ("the key 'max_steps' stands twice",)),
    "a key of another type": ("on: 1", ("True: a key is text",)),
    "a date that is none": ("name: 2024-13-45", ("month must be in 1..12",)),
    "two documents": ("name: a\n---\nname: b\n", ("not valid YAML",)),
    "too long": ("#" * (2**20 + 1), ("has 1,048,577 bytes, the most are 1,048,576",)),
    "extends itself": ("extends: run.yaml", ("extends this file in turn",)),
    "extends a list": ("extends: [a.yaml]", ("extends: name one run file",)),
    "extends a folder": ("extends: .", ("is a folder, not a file",)),
    "extends a device": ("extends: /dev/zero", ("/dev/zero: is no regular file",)),
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
    "no text": (_bytes, "is no UTF-8 text"),
    "a pipe": (os.mkfifo, "is no regular file"),
    "a link to itself": (_loop, "cannot be read"),
    "a device": (_device, "is no regular file"),
    "a chain": (_chain, "more than 20 run files extend one another"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_holds_no_run_file_is_refused(desk: Desk, case: str) -> None:
    make, name = PLACES[case]
    make(desk.file)
    desk.refuses("plan", names=("run", name))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as another program may have made it."""
    folder = tmp_path_factory.mktemp("made") / "given"
    tiny_policy(0).save(folder)
    return folder


def _config(**changes: object) -> Callable[[Path], None]:
    """Change a checkpoint's config; None takes a key out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def _write(name: str, content: bytes | str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def _link(name: str, target: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return link


def _pipe(name: str) -> Callable[[Path], None]:
    def pipe(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return pipe


def _sparse(name: str, size: int) -> Callable[[Path], None]:
    def grow(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return grow


def _header(facts: object, length: int | None = None) -> Callable[[Path], None]:
    """Give the weights a header of one's own, and say that it has so many bytes."""
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return _write("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


def _tensor(**facts: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | facts}


class Made(NamedTuple):
    """What is done to a checkpoint, and what its message names; `check` for what `plan` alone does not look at."""

    change: Callable[[Path], object]
    names: tuple[str, ...]
    check: bool = False


CHECKPOINTS = {
    "config: no JSON": Made(_write("config.json", "{"), ("config.json: not readable as JSON",)),
    "config: a list": Made(_write("config.json", "[]"), ("config.json: holds no JSON object",)),
    "config: no text": Made(_write("config.json", b"\xff"), ("config.json: is no UTF-8 text",)),
    "config: deep": Made(_write("config.json", '{"a":' * 100_000), ("config.json: not readable as JSON",)),
    "config: large": Made(_sparse("config.json", 2**33), ("config.json has 8,589,934,592 bytes",)),
    "config: a link to nothing": Made(_link("config.json", "nowhere"), ("no config.json",)),
    "config: a link to itself": Made(_link("config.json", "config.json"), ("no config.json",)),
    "config: a device": Made(_link("config.json", "/dev/zero"), ("no config.json",)),
    "config: empty": Made(_write("config.json", "{}"), ("config.json: it names no model_type",)),
    "config: a billion layers": Made(_config(num_hidden_layers=10**9), ("num_hidden_layers is 1000000000",)),
    "config: layers as text": Made(_config(num_hidden_layers="3"), ("num_hidden_layers is '3'",)),
    "config: no layers": Made(_config(num_hidden_layers=0), ("num_hidden_layers is 0",)),
    "config: a wide model": Made(_config(hidden_size=10**9), ("hidden_size is 1000000000",)),
    "config: wider than its weights": Made(_config(hidden_size=2**16), ("the weights have",)),
    "config: a large vocabulary": Made(_config(vocab_size=10**12), ("vocab_size is 1000000000000",)),
    "config: within it": Made(_config(text_config={"hidden_size": -1}), ("text_config.hidden_size is -1",)),
    "config: an unknown type": Made(_config(model_type="no_such"), ("base.checkpoint", "given", "no_such"), True),
    "config: heads that do not divide": Made(_config(num_attention_heads=True), ("num_attention_heads is True",)),
    "config: code of its own": Made(
        _config(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        ("base.checkpoint", "it brings code of its own", "remote_code: true"),
        True,
    ),
    "config: no language model": Made(_config(model_type="vit", architectures=None), ("base.checkpoint", "vit"), True),
    "config: another type": Made(_config(rope_parameters=[1]), ("base.checkpoint", "config.json"), True),
    "config: unknown layers": Made(_config(layer_types=["x", "y"]), ("base.checkpoint", "config.json"), True),
    "tokenizer: none": Made(_remove("tokenizer.json"), ("no tokenizer: none of tokenizer.json",)),
    "tokenizer: no JSON": Made(_write("tokenizer.json", "{"), ("its tokenizer cannot be read",), True),
    "tokenizer: empty": Made(_write("tokenizer.json", "{}"), ("its tokenizer cannot be read",), True),
    "tokenizer: large": Made(_sparse("tokenizer.json", 2**33), ("tokenizer.json has 8,589,934,592 bytes",)),
    "tokenizer: a pipe": Made(_pipe("tokenizer.json"), ("tokenizer.json is no regular file",)),
    "tokenizer: no settings": Made(_write("tokenizer_config.json", "7"), ("tokenizer_config.json: holds no",)),
    "template: large": Made(_sparse("chat_template.jinja", 2**24), ("chat_template.jinja has 16,777,216 bytes",)),
    "template: none": Made(_write("chat_template.jinja", "{% if %}"), ("is no template: line 1: Expected",), True),
    "template: endless": Made(
        _write("chat_template.jinja", "{% for i in range(10**12) %}x{% endfor %}"),
        ("domains.sort: the chat template of", "cannot be rendered: OverflowError: Range too big"),
        True,
    ),
    "template: of another type": Made(
        _write("chat_template.jinja", "{{ messages[0].content + 1 }}"),
        ("domains.sort: the chat template of", "cannot be rendered: TypeError"),
        True,
    ),
    "weights: none": Made(_remove("model.safetensors"), ("weights are read from safetensors files",)),
    "weights: empty": Made(_write("model.safetensors", ""), ("model.safetensors: its header",)),
    "weights: a long header": Made(_header({}, 2**62), ("model.safetensors: its header has 4,611,686,018,427",)),
    "weights: a header that is none": Made(_header(b"{"), ("model.safetensors: not readable as JSON",)),
    "weights: deep": Made(_header(b"[" * 100_000), ("model.safetensors: not readable as JSON",)),
    "weights: a huge shape": Made(_header(_tensor(shape=[10**9, 10**9])), ("tensor 'x' does not fit the file",)),
    "weights: a huge file": Made(_header(_tensor(data_offsets=[0, 2**60])), ("tensor 'x' does not fit the file",)),
    "weights: of no type": Made(_header(_tensor(dtype="PICKLE")), ("tensor 'x' does not fit the file",)),
    "weights: of another length": Made(_header(_tensor(shape=[5])), ("tensor 'x' does not fit the file",)),
    "weights: a link to a device": Made(_link("model.safetensors", "/dev/zero"), ("model.safetensors",)),
    "weights: a pipe beside": Made(_pipe("other.safetensors"), ("other.safetensors is no regular file",)),
    "index: no JSON": Made(_write("model.safetensors.index.json", "{"), ("not readable as an index of weights",)),
    "index: elsewhere": Made(
        _write("model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}'), ("names ../x.safetensors",)
    ),
    "an adapter beside": Made(_write("adapter_config.json", "{}"), ("makes it an adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_refused(desk: Desk, checkpoint: Path, case: str) -> None:
    made = CHECKPOINTS[case]
    shutil.copytree(checkpoint, desk.folder / "given")
    made.change(desk.folder / "given")
    desk.write(IMPORTED | {"base": {"checkpoint": str(desk.folder / "given")}})
    desk.refuses("plan", *(["--check"] if made.check else []), names=made.names)


def test_the_same_checkpoint_unchanged_passes_and_a_model_card_makes_no_difference(
    desk: Desk, checkpoint: Path
) -> None:
    given = desk.folder / "given"
    shutil.copytree(checkpoint, given)
    desk.write(IMPORTED | {"base": {"checkpoint": str(given)}})
    assert desk.call("plan", "--check").exit_code == 0
    keys = [entry["key"] for entry in json.loads(desk.call("plan", "--json").stdout)]
    (given / "README.md").write_text("A model.")
    (given / "LICENSE").write_text("Free.")
    assert [entry["key"] for entry in json.loads(desk.call("plan", "--json").stdout)] == keys
    (given / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert [entry["key"] for entry in json.loads(desk.call("plan", "--json").stdout)] != keys


OWN = """
from experts.domain import Domain, Example, Options, stable_hash
{imports}

class Mine(Domain):
    def __init__(self, name, options):
        super().__init__(name)

    def draw(self, split, count, seed):
        {draw}

    def score(self, example, completion):
        {score}

    def fingerprint(self):
        {fingerprint}


def load(name, options):
    {load}
"""
DRAWS = "return [Example(f'{split} {n}', str(n), self.name, f'{split} {n}') for n in range(count)]"  # fmt: skip


def own(**parts: str) -> str:
    """A domain of one's own, with parts of it replaced."""
    whole = {"imports": "", "draw": DRAWS, "score": "return float(completion == example.answer)"}
    whole |= {"fingerprint": "return 'one'", "load": "return Mine(name, options)"}
    return OWN.format(**whole | parts)


OWN_FILES = {
    "no Python": ("def load(:", ("SyntaxError",)),
    "empty": ("", ("here is no Options and no load",)),
    "no options of a kind": ("Options = 3\ndef load(name, options): pass", ("Options is no pydantic model",)),
    "load gives nothing": (own(load="return None"), ("load gives None; it has to return a Domain",)),
    "load raises": (own(load="raise KeyError('x')"), ("load: KeyError: 'x'",)),
    "import ends the process": (own(imports="exit(0)"), ("import: SystemExit: 0",)),
    "load ends the process": (own(load="exit(0)"), ("load: SystemExit: 0",)),
    "load has no end": (own(load="return load(name, options)"), ("load: RecursionError",)),
    "fingerprint raises": (own(fingerprint="return 1 / 0"), ("fingerprint: ZeroDivisionError",)),
    "fingerprint is no text": (own(fingerprint="return None"), ("fingerprint gives no text but None",)),
    "fingerprint ends the process": (own(fingerprint="exit(0)"), ("fingerprint: SystemExit: 0",)),
    "draw gives nothing": (own(draw="return []"), ("draw gives 0 examples",)),
    "draw gives one prompt": (
        own(draw="return [Example('a', 'b', self.name, 'a')] * count"),
        ("has the prompt of an earlier one",),
    ),
    "draw gives text": (own(draw="return ['a'] * count"), ("is no Example but str",)),
    "draw gives an empty prompt": (own(draw="return [Example(' ', 'b', self.name, 'a')] * count"), ("prompt is empty",)),
    "draw gives a megabyte": (
        own(draw="return [Example('a' * 2**20, 'b', self.name, 'a')] * count"),
        ("has 1,048,576 characters",),
    ),
    "draw ends the process": (own(draw="exit(0)"), ("draw: SystemExit: 0",)),
    "score is no number": (own(score="return 'right'"), ("score gives right (str)",)),
    "the gold answer is no text": (
        own(draw="return [Example(f'{n} {split}', 7, self.name, f'{n} {split}') for n in range(count)]"),
        ("answer is no text but 7",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN_FILES)
def test_a_domain_of_ones_own_that_does_not_work_is_refused(desk: Desk, case: str) -> None:
    text, names = OWN_FILES[case]
    (desk.folder / "mine.py").write_text(text)
    desk.write(RUN | {"domains": RUN["domains"] | {"general": {"kind": "mine.py"}}})
    desk.refuses("plan", "--check", names=("general", "mine.py", *names))


FIELDS = {"prompt_field": "q", "answer_field": "a"}
GOOD = [{"q": f"{n} and {n}", "a": str(2 * n)} for n in range(40)]


class Rows(NamedTuple):
    """Rows of a `hub` domain, its options, and what its message names."""

    rows: list[Any] | str
    names: tuple[str, ...]
    options: dict[str, Any] = FIELDS


def with_row(row: object) -> list[Any]:
    return [*GOOD, row]


def template(text: str, *names: str) -> Rows:
    return Rows(
        GOOD, ("domains.general.options.prompt_template", *names), {"prompt_template": text, "answer_field": "a"}
    )


CHAT: dict[str, Any] = {"prompt_field": "q", "answer_field": "a"}
HUB = {
    "no rows": Rows("", ("rows.jsonl",)),
    "no JSON": Rows("{", ("row 1 (line 1)", "is not valid JSON")),
    "deep": Rows('{"q": ' * 100_000, ("nested too deeply",)),
    "no objects": Rows("7\n8\n", ("is no JSON object",)),
    "a field twice": Rows('{"q": "1", "q": "2", "a": "3"}\n', ("field 'q' stands twice",)),
    "no such field": Rows(GOOD, ("did you mean 'a'",), {"prompt_field": "q", "answer_field": "aa"}),
    "no prompt": Rows(with_row({"q": "", "a": "x"}), ("row 41", "'q' is empty")),
    "no answer": Rows(with_row({"q": "x", "a": " "}), ("row 41", "'a' is empty")),
    "a null answer": Rows(with_row({"q": "x", "a": None}), ("row 41", "'a' is missing or null")),
    "no right answer": Rows(with_row({"q": "x", "a": []}), ("row 41", "'a' is an empty list")),
    "an object": Rows(with_row({"q": "x", "a": {"b": 1}}), ("row 41", "'a' is an object")),
    "a megabyte": Rows(with_row({"q": "x" * 2**20, "a": "x"}), ("row 41", "1,048,576 characters")),
    "half a character": Rows('{"q": "\\ud800", "a": "1"}\n', ("half of a surrogate pair",)),
    "another role": Rows(with_row({"q": [{"role": "usr", "content": "x"}], "a": "y"}), ("did you mean 'user'",), CHAT),
    "a tool's call": Rows(
        with_row({"q": [{"role": "user", "content": "x", "tool_calls": [1]}], "a": "y"}), ("'tool_calls'",), CHAT
    ),
    "an answered prompt": Rows(
        with_row({"q": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}], "a": "y"}),
        ("ends with its answer",),
        CHAT,
    ),
    "no number": Rows(GOOD[:3] + [{"q": "x", "a": "many"}], ("no number or formula",), FIELDS | {"scorer": "numeric"}),
    "too few": Rows(GOOD[:1], ("domains.general", "no held_out examples")),
    "a conversion": template("{q!z}", "plain field names in braces only"),
    "a width": template("{q:>1000000000}", "plain field names in braces only"),
    "an attribute": template("{q.__class__.__mro__[1]}", "plain field names in braces only"),
    "an open brace": template("{q", "expected '}'"),
    "no field": template("always the same", "names no field in braces"),
    "no expression": Rows(GOOD, ("no regular expression",), FIELDS | {"answer_pattern": "("}),
    "two groups": Rows(GOOD, ("2 groups",), FIELDS | {"answer_pattern": "(a)(b)"}),
    "a share": Rows(GOOD, ("held_out_share",), FIELDS | {"held_out_share": 1.5}),
    "a folder without rows": Rows(GOOD, ("holds no file that ends in",), FIELDS | {"path": "empty"}),
    "a device": Rows(GOOD, ("is neither a file nor a folder",), FIELDS | {"path": "/dev/zero"}),
    "another ending": Rows(GOOD, ("is no file of rows",), FIELDS | {"path": "run.yaml"}),
    "nothing": Rows(GOOD, ("no such file",), FIELDS | {"path": "nowhere.jsonl"}),
}


@pytest.mark.parametrize("case", HUB)
def test_rows_that_cannot_be_used_are_refused(desk: Desk, case: str) -> None:
    entry = HUB[case]
    text = entry.rows if isinstance(entry.rows, str) else "".join(json.dumps(row) + "\n" for row in entry.rows)
    (desk.folder / "rows.jsonl").write_text(text)
    (desk.folder / "empty").mkdir()
    domain = {"kind": "hub", "options": {"path": "rows.jsonl", **entry.options}}
    desk.write(RUN | {"domains": RUN["domains"] | {"general": domain}})
    desk.refuses("plan", "--check", names=("domains.general", *entry.names))


CHECKED = {
    "completions as long as the context": Value(
        f"{RL}.max_new_tokens=512", ("experts/sort@0: max_new_tokens 512 leaves no room for a prompt",)
    ),
    "fewer prompts than domains": Value(
        "merge.prompts_per_step=1", ("student@0: prompts_per_step 1 leaves no prompt",)
    ),
    "a context shorter than the data": Value("base.pretrain.model.max_length=8", ("domains.", "tokens")),
    "prompts longer than they may be": Value(f"{RL}.max_prompt_tokens=3", ("domains.sort", "more than 3 tokens")),
    "more devices than there are": Value("resources.gpus=4000", ("resources.gpus",)),
    "weights sharded over one device": Value("merge.sharding=fsdp", ("merge.sharding: fsdp shards over 2",)),
    "a task that is none": Value(
        "domains.general={kind: reasoning, options: {tasks: {no_such: {}}}}", ("reasoning-gym has no task 'no_such'",)
    ),
    "a parameter that is none": Value(
        "domains.general={kind: reasoning, options: {tasks: {chain_sum: {terms: 1}}}}", ("terms: unknown parameter",)
    ),
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_planning_alone_does_not_see_is_found_by_the_check(desk: Desk, case: str) -> None:
    desk.write(RUN)
    desk.refuses("plan", "--check", CHECKED[case].override, names=CHECKED[case].names)


def _damaged(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


LOCK, CHAMPION = "runs/tiny/lock.json", "runs/tiny/champion.json"
ARTIFACT = "store/0123456789abcdef01234567"
# What is damaged, how, and what the message names beside the place.
HOMES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "a file": ("", _damaged("x"), ("is no folder", "choose another --home")),
    "a link to nothing": ("", lambda path: path.symlink_to("nowhere"), ("leads to nothing", "choose another --home")),
    "a link to itself": ("", lambda path: path.symlink_to(path), ("leads to nothing",)),
    "a store that is a file": ("store", _damaged("x"), ("is no folder",)),
    "a lock of half a line": (LOCK, _damaged('{"pins": {'), ("not readable as JSON", "move it away", "`mopd run`")),
    "a lock that is empty": (LOCK, _damaged(""), ("not readable as JSON", "move it away")),
    "a lock of another type": (LOCK, _damaged("[]"), ("holds no JSON object", "move it away")),
    "a lock of bytes": (LOCK, lambda path: path.write_bytes(b"\xff\xfe"), ("is no UTF-8 text", "move it away")),
    "a lock without keys": (LOCK, _damaged('{"nodes": {"base@0": {}}}'), ("nodes.base@0.key", "move it away")),
    "a lock with odd pins": (LOCK, _damaged('{"pins": {"champion": 3}}'), ("pins.champion", "move it away")),
    "a deep lock": (LOCK, _damaged("[" * 100_000), ("nested too deeply",)),
    "a lock that is a folder": (LOCK, _folder, ("is a folder, not a file",)),
    "a lock that is a pipe": (LOCK, os.mkfifo, ("is no regular file",)),
    "a champion of half a line": (CHAMPION, _damaged("{"), ("not readable as JSON", "`mopd promote")),
    "a champion of another type": (CHAMPION, _damaged('{"history": [{"student": 3}]}'), ("history.0", "`mopd promote")),
    "a champion without anything": (CHAMPION, _damaged("{}"), ("student", "`mopd promote")),
}


@pytest.mark.parametrize("case", HOMES)
def test_a_damaged_home_is_named_with_what_mends_it(desk: Desk, case: str) -> None:
    name, damage, names = HOMES[case]
    place = desk.home / name if name else desk.home
    place.parent.mkdir(parents=True, exist_ok=True)
    damage(place)
    desk.write(RUN)
    done = desk.call("plan")
    assert done.exit_code == MISTAKE, (done.exit_code, done.exception, done.stderr)
    assert done.stderr.count("error: ") == 1 and done.stderr.startswith(f"error: {place}: "), done.stderr
    for each in names:
        assert each in done.stderr


@pytest.mark.parametrize("damage", [LOCK, CHAMPION])
@pytest.mark.parametrize("command", ["status", "report"])
def test_status_and_report_go_on_with_what_can_be_read(desk: Desk, command: str, damage: str) -> None:
    (desk.home / "runs" / "tiny").mkdir(parents=True)
    (desk.home / damage).write_text("{")
    desk.write(RUN)
    done = desk.call(command)
    assert done.exit_code == 0, (done.exception, done.stderr)
    assert "base" in done.stdout
    if not (command == "status" and damage == CHAMPION):
        assert f"warning: {desk.home / damage}: not readable as JSON" in done.stderr
    if command == "report":
        assert (desk.home / "runs" / "tiny" / "report.html").is_file()


def key_of(desk: Desk, node: str) -> str:
    return next(entry["key"] for entry in json.loads(desk.call("plan", "--json").stdout) if entry["node"] == node)


def test_status_reads_a_damaged_journal_and_error(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.write(RUN)
    work = desk.home / "work" / key_of(desk, "base@0")
    work.mkdir(parents=True)
    lines = [
        '{"time": 1, "step": 3, "kind": "progress", "total": 5}',
        '{"time": 1, "ste',
        "\x00\xff",
        '{"time": 1, "step": 4, "kind": "progress", "total": 5}',
        '{"time": 1, "step": "x", "kind": "progress", "total": 5}',
        '{"time": 1, "step": 5, "ki',
    ]
    (work / "journal.jsonl").write_text("\n".join(lines))
    (work / "error.json").write_text("{")
    done = desk.call("status")
    assert done.exit_code == 0, (done.exception, done.stderr)
    assert "4/5" in done.stdout
    assert f"warning: {work / 'error.json'}: not readable as JSON" in done.stderr
    assert f"{work / 'journal.jsonl'}: 2 lines are damaged" in caplog.text
    done = desk.call("report")
    assert done.exit_code == 0, (done.exception, done.stderr)


def test_a_stray_file_in_the_store_is_passed_over(desk: Desk) -> None:
    desk.write(RUN)
    assert desk.call("plan").exit_code == 0
    (desk.home / "store" / "notes.txt").write_text("x")
    (desk.home / "store" / "empty").mkdir()
    for command in ("plan", "status", "report"):
        done = desk.call(command)
        assert done.exit_code == 0, (done.exception, done.stderr)
    assert CliRunner().invoke(app, ["gc", "--home", str(desk.home)]).exit_code == 0


@pytest.mark.parametrize("manifest", ["{", "[]", '{"digest": 3}', None])
def test_an_artifact_whose_manifest_is_damaged_is_named_and_the_others_are_read(
    desk: Desk, manifest: str | None
) -> None:
    desk.write(RUN)
    place = desk.home / "store" / key_of(desk, "base@0")
    if manifest is None:
        place.write_text("a file where a folder belongs")
    else:
        place.mkdir()
        (place / "manifest.json").write_text(manifest)
    done = desk.call("plan")
    assert done.exit_code == MISTAKE and str(place) in done.stderr and "--discard-corrupted" in done.stderr
    for command in ("status", "report"):
        done = desk.call(command)
        assert done.exit_code == 0, (done.exception, done.stderr)
        assert f"warning: {place}" in done.stderr and "--discard-corrupted" in done.stderr


def test_a_report_whose_place_is_taken_by_a_folder_is_named(desk: Desk) -> None:
    place = desk.home / "runs" / "tiny" / "report.html"
    place.mkdir(parents=True)
    desk.write(RUN)
    done = desk.call("report")
    assert done.exit_code == MISTAKE
    assert done.stderr == f"error: {place}: a folder where a file belongs; move it away\n"
