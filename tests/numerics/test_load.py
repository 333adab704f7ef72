"""A checkpoint made elsewhere: nothing it brings is run, and its weights arrive as they are."""

import json
from pathlib import Path

import pytest
import torch

from experts.errors import UserError
from stages import load
from stages.config import LoraConfig
from stages.core.checkpoint import Store
from stages.core.policy import load_policy
from stages.core.source import Source, resolve_checkpoint
from stages.core.workspace import Workspace
from stages.export import export_weights
from tests.numerics.conftest import tiny_policy


def given(folder: Path) -> Source:
    tiny_policy(3).save(folder)
    return Source("directory", str(folder))


def test_weights_arrive_as_they_are(tmp_path, workspace, store):
    source = given(tmp_path / "given")
    made = load.run(source, workspace("k", {}, {}))
    before, after = tiny_policy(3).model.state_dict(), load_policy(made, store).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pickle_is_neither_planned_nor_read(tmp_path, workspace):
    source = given(tmp_path / "given")
    folder = Path(source.location)
    torch.save(tiny_policy(3).model.state_dict(), folder / "pytorch_model.bin")
    assert resolve_checkpoint("base.checkpoint", str(folder), None, None).kind == "directory"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^base\.checkpoint: .*only pytorch_model\.bin, and a pickle can run any code"):
        resolve_checkpoint("base.checkpoint", str(folder), None, None)
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load.run(source, workspace("k", {}, {}))


def test_a_models_own_code_is_not_run(tmp_path, workspace):
    source = given(tmp_path / "given")
    folder, mark = Path(source.location), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    with pytest.raises(UserError, match="it brings code of its own"):
        load.run(source, workspace("k", {}, {}))
    assert not mark.exists()


def test_the_digest_is_the_same_with_and_without_the_hub_and_from_any_place(tmp_path, monkeypatch):
    """The keys of how a tokenizer was read differ; the bytes that are hashed do not."""
    source = given(tmp_path / "given")
    digests, written = [], []
    for offline in (False, True):
        monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda offline=offline: offline)
        store = Store(tmp_path / f"home-{offline}")
        base = load.run(source, Workspace(store, "base", "base", 0, {}, {}, {}))
        policy = load_policy(base, store, lora=LoraConfig(rank=2), seed=0)
        folder = store.staging("adapter")
        policy.save(folder)
        adapter = Workspace(store, "adapter", "adapter", 0, {}, {}, {}).commit(
            folder, sources={}, metrics={}, adapter_base="base"
        )
        exported = tmp_path / f"exported-{offline}"
        exported.mkdir()
        export_weights(adapter, store, exported)
        digests.append((base.digest, adapter.digest))
        written += [(place / "tokenizer_config.json").read_text() for place in (base.path, adapter.path, exported)]
    assert digests[0] == digests[1]
    # Also of one that was never read from a file, and with what it means still in it.
    assert set(written) == {(tmp_path / "given" / "tokenizer_config.json").read_text()}
    assert {"eos_token", "tokenizer_class", "extra_special_tokens"} <= json.loads(written[0]).keys()
