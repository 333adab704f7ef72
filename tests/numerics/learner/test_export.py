"""What leaves the store is read by transformers as it is, with the checkpoint's logits, tokenizer and lineage."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.sft
from base.errors import UserError
from flows.lineage.export import export
from stages.config.training import LoraConfig, SFTConfig
from stages.model.policy import load_policy

TOKENS = torch.tensor([[7, 30, 60, 12]])


@pytest.fixture
def adapter(checkpoint, workspace, domains):
    config = SFTConfig(max_steps=3, examples=40, batch_size=8, lora=LoraConfig(rank=4))
    return stages.sft.train(config, workspace("adapter", {"start": checkpoint("start", 0)}, domains))


def test_an_adapter_is_merged_and_reads_back(store, adapter, tmp_path: Path) -> None:
    (said,) = export(store, "adapter", tmp_path / "out")
    assert "read back with equal logits" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not any(name.startswith("adapter") or name.endswith((".bin", ".pt")) for name in names)
    with torch.no_grad():
        merged, worn = model(TOKENS).logits, load_policy(adapter, store).model(TOKENS).logits
    torch.testing.assert_close(merged, worn, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter.uri).chat_template


def test_the_card_has_the_lineage_and_loads_as_a_card(store, adapter, tmp_path: Path) -> None:
    export(store, "adapter", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "mopd" in card.data.tags
    assert adapter.digest[:12] in card.text and "start: start" in card.text
    kept = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert [row["key"] for row in kept] == ["start", "adapter"] and kept[1]["data"]


def test_a_type_is_a_choice(store, adapter, tmp_path: Path) -> None:
    export(store, "adapter", tmp_path / "small", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"--dtype: 'bfloat' is none of .*did you mean 'bfloat16'"):
        export(store, "adapter", tmp_path / "other", dtype="bfloat")
    assert sorted(path.name for path in tmp_path.iterdir() if "other" in path.name) == []


def test_what_is_there_is_not_written_over(store, adapter, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="full: this directory exists and is not empty"):
        export(store, "adapter", tmp_path / "full")
    with pytest.raises(UserError, match="--push: 'mine': name a repository of the Hub as OWNER/NAME"):
        export(store, "adapter", tmp_path / "out", push="mine")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as an upload needs; keeps what it was sent."""

    files: dict[str, bytes]
    asked: list[dict]

    def do_POST(self) -> None:
        """Make a repository, say how files are sent, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.asked.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/student", "id": "me/student"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/student/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        """The repository as it is: empty."""
        self.answer({"id": "me/student", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    address = f"http://127.0.0.1:{server.server_address[1]}"
    for module in (huggingface_hub.constants, huggingface_hub.hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()


def test_a_push_makes_a_private_repository_with_every_file(store, adapter, tmp_path: Path, hub: type[Hub]) -> None:
    said = export(store, "adapter", tmp_path / "out", push="me/student")
    assert "pushed to" in said[1]
    assert hub.asked == [{"name": "student", "organization": "me", "visibility": "private"}]
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_push_that_fails_leaves_the_directory_and_says_how_to_send_it(
    store, adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--push me/student: .*`hf upload me/student .*out \.` sends it later"):
        export(store, "adapter", tmp_path / "out", push="me/student")
    assert (tmp_path / "out" / "model.safetensors").exists()
