"""Checkpoints from elsewhere that are damaged or hostile: refused by the plan or its check, and named."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.numerics.conftest import tiny_policy
from tests.support.desk import IMPORTED, RUN, Desk


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
    "config: a list": Made(_write("config.json", "[]"), ("config.json: contains [], not a JSON object",)),
    "config: no text": Made(_write("config.json", b"\xff"), ("config.json: is not UTF-8 text",)),
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
        ("base.checkpoint", "it contains code of its own", "remote_code: true"),
        True,
    ),
    "config: no language model": Made(_config(model_type="vit", architectures=None), ("base.checkpoint", "vit"), True),
    "config: another type": Made(_config(rope_parameters=[1]), ("base.checkpoint", "config.json"), True),
    "config: unknown layers": Made(_config(layer_types=["x", "y"]), ("base.checkpoint", "config.json"), True),
    "tokenizer: none": Made(_remove("tokenizer.json"), ("no tokenizer: none of tokenizer.json",)),
    "tokenizer: no JSON": Made(_write("tokenizer.json", "{"), ("its tokenizer cannot be read",), True),
    "tokenizer: empty": Made(_write("tokenizer.json", "{}"), ("its tokenizer cannot be read",), True),
    "tokenizer: large": Made(_sparse("tokenizer.json", 2**33), ("tokenizer.json has 8,589,934,592 bytes",)),
    "tokenizer: a pipe": Made(_pipe("tokenizer.json"), ("tokenizer.json is not a regular file",)),
    "tokenizer: no settings": Made(_write("tokenizer_config.json", "7"), ("contains 7, not a JSON object",)),
    "template: large": Made(_sparse("chat_template.jinja", 2**24), ("chat_template.jinja has 16,777,216 bytes",)),
    "template: none": Made(_write("chat_template.jinja", "{% if %}"), ("is not valid: line 1: Expected",), True),
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
    "weights: a long header": Made(_header({}, 2**62), ("model.safetensors: its header claims 4,611,686,018,427",)),
    "weights: a header that is none": Made(_header(b"{"), ("model.safetensors: not readable as JSON",)),
    "weights: deep": Made(_header(b"[" * 100_000), ("model.safetensors: not readable as JSON",)),
    "weights: a huge shape": Made(_header(_tensor(shape=[10**9, 10**9])), ("tensor 'x' does not fit the file",)),
    "weights: a huge file": Made(_header(_tensor(data_offsets=[0, 2**60])), ("tensor 'x' does not fit the file",)),
    "weights: of no type": Made(_header(_tensor(dtype="PICKLE")), ("tensor 'x' does not fit the file",)),
    "weights: of another length": Made(_header(_tensor(shape=[5])), ("tensor 'x' does not fit the file",)),
    "weights: a link to a device": Made(_link("model.safetensors", "/dev/zero"), ("model.safetensors",)),
    "weights: a pipe beside": Made(_pipe("other.safetensors"), ("other.safetensors is not a regular file",)),
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


def test_a_teacher_with_another_tokenizer_is_found_before_training(desk: Desk, checkpoint: Path) -> None:
    foreign = desk.folder / "foreign"
    shutil.copytree(checkpoint, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    desk.write(RUN)
    override = f"experts.sort={{domain: sort, checkpoint: {foreign}}}"
    names = ("merge.teachers.sort: the tokenizer of teacher experts/sort differs from that of the student's",)
    desk.refuses("plan", "--check", override, names=names)
