"""A checkpoint made elsewhere: nothing it brings is run, and its weights arrive as they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from base.errors import UserError
from base.store.checkpoint import Store
from base.store.source import Source, resolve_checkpoint, resolve_gguf
from stages import load
from stages.config.training import LoraConfig
from stages.export import export_weights
from stages.learner.workspace import Workspace
from stages.model.policy import load_policy
from stages.rows.trained_on import TrainedOn
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
    with pytest.raises(UserError, match=r"no safetensors file"):
        load.run(source, workspace("k", {}, {}))


def test_a_models_own_code_is_not_run(tmp_path, workspace):
    source = given(tmp_path / "given")
    folder, mark = Path(source.location), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    with pytest.raises(UserError, match="it contains code of its own"):
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
        assert TrainedOn.read(base).unknown == ("base",)
        policy = load_policy(base, store, lora=LoraConfig(rank=2), seed=0)
        folder = store.staging("adapter")
        policy.save(folder)
        adapter = Workspace(store, "adapter", "adapter", 0, {}, {}, {}).commit(
            folder, trained_on=TrainedOn(), metrics={}, adapter_base="base"
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


def beside(folder: Path, elsewhere: Path) -> None:
    """An adapter beside the weights that names a base elsewhere."""
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(peft | {"base_model_name_or_path": str(elsewhere)}))
    shape = tiny_policy(3).model.config
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    heads = tiny_policy(3).model.model.layers[0].self_attn.q_proj.weight.shape[0]
    factors = {name.format("A"): torch.ones(2, shape.hidden_size), name.format("B"): torch.ones(heads, 2)}
    save_file(factors, folder / "adapter_model.safetensors")


def test_an_adapter_beside_the_weights_is_refused_and_the_path_it_names_is_not_read(tmp_path, workspace):
    source, elsewhere = given(tmp_path / "given"), tmp_path / "elsewhere"
    folder = Path(source.location)
    tiny_policy(5).save(elsewhere)
    beside(folder, elsewhere)
    message = rf"{folder}: adapter_config\.json .* merge the adapter .* or move it"
    with pytest.raises(UserError, match=rf"^base\.checkpoint: {message}"):
        resolve_checkpoint("base.checkpoint", str(folder), None, None)
    with pytest.raises(UserError, match=message):
        load.run(source, workspace("k", {}, {}))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    assert resolve_checkpoint("base.checkpoint", str(folder), None, None).kind == "directory"


def test_an_adapter_alone_is_no_base(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    beside(folder, tmp_path)
    with pytest.raises(UserError, match=r"adapter_config\.json .* merge the adapter"):
        resolve_checkpoint("experts.sort.checkpoint", str(folder), None, None)


def test_an_adapter_beside_a_gguf_file_is_refused_as_well(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF....")
    assert resolve_gguf(str(tmp_path / "model.gguf")).kind == "gguf"
    beside(tmp_path, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base\.gguf: .*adapter_config\.json"):
        resolve_gguf(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "{elsewhere}/model.safetensors", "absent.safetensors"]
)
def test_weights_outside_of_the_folder_are_not_read(tmp_path, workspace, name):
    """The index of the shards names files; a path there leads out of what was fingerprinted."""
    source, elsewhere = given(tmp_path / "given"), tmp_path / "elsewhere"
    folder = Path(source.location)
    tiny_policy(5).save(elsewhere)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name.format(elsewhere=elsewhere))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"^base\.checkpoint: .*model\.safetensors\.index\.json names .*safetensors"):
        resolve_checkpoint("base.checkpoint", str(folder), None, None)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names"):
        load.run(source, workspace("k", {}, {}))


def test_templates_in_a_folder_below_count_in_the_fingerprint(tmp_path):
    source = given(tmp_path / "given")
    folder = Path(source.location) / "additional_chat_templates"
    before = source.fingerprint()
    folder.mkdir()
    (folder / "tools.jinja").write_text("{{ messages }}")
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95, "do_sample": True}),
        ({"num_beams": 1, "length_penalty": 2.0}, {"eos_token_id": [1, 7]}),
    ],
)
def test_generation_settings_that_transformers_reads_and_refuses_to_write(tmp_path, workspace, store, settings, kept):
    source = given(tmp_path / "given")
    file = Path(source.location) / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 7], **settings}))
    model = AutoModelForCausalLM.from_pretrained(source.location)
    with pytest.raises(ValueError, match="invalid"):
        model.save_pretrained(tmp_path / "refused")
    made = load.run(source, workspace("k", {}, {}))
    written = json.loads((made.path / "generation_config.json").read_text())
    assert {"eos_token_id": [1, 7]}.items() <= written.items() and kept.items() <= written.items()
    assert set(load_policy(made, store).stop_ids) >= {1, 7}
