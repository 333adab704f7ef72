"""Hand-overs of full weights: tensor by tensor, in the server's number type, to files or from device to device."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import stages.vllm.remote_handover as module
from base.errors import UserError
from stages.config.on_policy import RLConfig
from stages.vllm.handover import HEAD, Probe, full_weights, weight_shapes
from stages.vllm.remote_handover import RemoteHandOver, read_weights, save_weights
from stages.vllm.settings import NO_VERSION
from tests.numerics.conftest import tiny_policy


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files_of(folder) for name, tensor in load_file(file).items()}


def test_files_hold_matrices_in_the_server_s_number_type_and_vectors_in_float32(tmp_path):
    policy = tiny_policy(0)
    save_weights(policy, tmp_path / "w", torch.bfloat16)
    found = loaded(tmp_path / "w")
    own = dict(full_weights(policy))
    assert found.keys() == own.keys()
    assert HEAD in found
    for name, tensor in found.items():
        assert tensor.dtype == (torch.bfloat16 if tensor.dim() > 1 else torch.float32), name
        assert torch.equal(tensor, own[name].to(tensor.dtype))


def test_tensors_are_written_while_others_are_not_yet_asked_for(tmp_path, monkeypatch):
    """The device and the host never hold a second copy of the whole model."""
    policy, seen = tiny_policy(0), []

    def watched(*arguments):
        for pair in full_weights(*arguments):
            seen.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield pair

    monkeypatch.setattr(module, "full_weights", watched)
    monkeypatch.setattr(module, "FILE_BYTES", 5_000)
    save_weights(policy, tmp_path / "w", torch.bfloat16)
    assert seen[0] == 0
    assert seen[-1] > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files_of(tmp_path / "w")]
    largest = max(tensor.nbytes for tensor in loaded(tmp_path / "w").values())
    assert len(sizes) > 3
    assert max(sizes) < 5_000 + largest


def test_files_are_read_back_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 5_000)
    policy = tiny_policy(0)
    save_weights(policy, tmp_path / "w")
    names = list(weight_shapes(policy))
    found = list(read_weights(tmp_path / "w", names, torch.device("cpu")))
    assert [name for name, _ in found] == names
    assert all(torch.equal(tensor, own) for (_, tensor), (_, own) in zip(found, full_weights(policy), strict=True))


class Server:
    """A server of the student's shape that takes weights both ways, and scores nothing."""

    def __init__(self, model: Path) -> None:
        self.url, self.model = "http://127.0.0.1:1", model
        self.version, self.taken = NO_VERSION, []

    def weight_version(self) -> str:
        return self.version

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def setting(self, group: str, name: str) -> str:
        return {"dtype": "torch.bfloat16", "logprobs_mode": "raw_logprobs", "model": str(self.model)}[name]

    def load_weights(self, folder: Path) -> None:
        self.taken.append(("file", loaded(folder)))

    def restart(self) -> None:
        self.version = NO_VERSION


class Transfer:
    """Stands for NCCL: the server gets what would be sent."""

    made: ClassVar[list["Transfer"]] = []

    def __init__(self, server, shapes, dtype, tensors) -> None:
        self.server, self.shapes, self.tensors, self.closed = server, shapes, tensors, False
        self.made.append(self)

    def send(self) -> None:
        sent = dict(self.tensors())
        assert list(sent) == list(self.shapes)
        self.server.taken.append(("nccl", sent))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def handing(tmp_path, monkeypatch):
    """A hand-over to one server that takes transfers, and the server."""
    policy = tiny_policy(0)
    policy.model.config.save_pretrained(tmp_path / "model")
    server = Server(tmp_path / "model")
    monkeypatch.setattr(module, "takes_transfers", lambda server: True)
    monkeypatch.setattr(module, "NcclTransfer", Transfer)
    monkeypatch.setattr(RemoteHandOver, "_prove", lambda *arguments: None)
    Transfer.made = []
    folder = tmp_path / "weights"
    folder.mkdir()
    return RemoteHandOver(policy, RLConfig(dtype="bfloat16"), "k", folder, "raw_logprobs"), policy, server


def test_weights_that_go_from_device_to_device_are_not_written(handing):
    given, policy, server = handing
    for version in range(3):
        given.publish(policy, version, Probe([1, 2], 1, [0.0], 1.0), True)
        given.bring_up_to_date(server, policy, True)
        with torch.no_grad():
            policy.head_VH.add_(1.0)
    assert [way for way, _ in server.taken] == ["nccl"] * 3
    assert not list(given.folder.rglob("*.safetensors"))
    assert len(Transfer.made) == 1
    first, last = (server.taken[index][1][HEAD] for index in (0, 2))
    assert first.dtype == torch.bfloat16
    assert float((last.float() - first.float()).mean()) == pytest.approx(2.0, abs=0.01)


def test_a_server_that_lost_such_weights_gets_them_by_file(handing):
    given, policy, server = handing
    given.publish(policy, 0, Probe([1, 2], 1, [0.0], 1.0), True)
    given.bring_up_to_date(server, policy, True)
    server.restart()
    given.bring_up_to_date(server, policy)
    assert [way for way, _ in server.taken] == ["nccl", "file"]
    assert server.version == given.current()["name"]
    sent, read = (taken for _, taken in server.taken)
    assert all(torch.equal(read[name], tensor) for name, tensor in sent.items())
    assert Transfer.made[0].closed


def test_a_server_of_another_number_type_is_refused(handing, tmp_path):
    given, policy, server = handing
    given.config = RLConfig()
    given.publish(policy, 0, Probe([1, 2], 1, [0.0], 1.0))
    with pytest.raises(UserError, match="computes in bfloat16, this stage in float32"):
        given.bring_up_to_date(server, policy)


def test_current_names_the_files(handing):
    given, policy, _ = handing
    given.publish(policy, 4, Probe([1, 2], 1, [0.0], 1.0))
    folder = given.folder / json.loads((given.folder / "current.json").read_text())["folder"]
    with safe_open(files_of(folder)[0], "pt") as file:
        assert HEAD in file.keys()  # noqa: SIM118
