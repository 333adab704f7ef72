"""The store's mirror: what one machine made another finds, whole or not at all; what cannot be sent is sent later."""

import json
import logging
import os
from pathlib import Path

import pytest

from base.errors import UserError
from base.store import mirror
from base.store.checkpoint import Artifact, CorruptedArtifactError, Store
from base.store.mirror import Mirror

HERE, THERE = "here", "there"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder all machines see, as `MOPD_STORE` names it."""
    folder = tmp_path / "shared"
    monkeypatch.setenv("MOPD_STORE", f"file://{folder}")
    monkeypatch.setattr(mirror, "FRESH_SECONDS", 0.0)
    mirror.mirror_of.cache_clear()
    return folder


def make(store: Store, key: str, stage: str = "sft", text: str = "weights") -> Artifact:
    folder = store.staging(key)
    (folder / "model.txt").write_text(text)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "file.txt").write_text(text)
    return store.commit(folder, key, {"name": key, "stage": stage})


def test_what_one_machine_made_another_finds_and_brings_when_it_is_needed(remote: Path, tmp_path: Path) -> None:
    made = make(Store(tmp_path / HERE), "checkpoint")
    other = Store(tmp_path / THERE)
    found = other.find("checkpoint")
    assert found is not None and found.digest == made.digest
    # Planning needs the manifest alone.
    assert not other.is_here(found) and list(other.root.glob("checkpoint")) == []
    other.verify(found)
    brought = other.get("checkpoint")
    assert (brought.path / "deeper" / "file.txt").read_text() == "weights" and other.is_here(brought)
    assert [artifact.key for artifact in other.artifacts()] == ["checkpoint"]
    assert other.find("nothing") is None


def test_a_measurement_is_brought_when_it_is_found(remote: Path, tmp_path: Path) -> None:
    make(Store(tmp_path / HERE), "scores", "evaluate")
    found = Store(tmp_path / THERE).find("scores")
    assert (found.path / "model.txt").exists()


def test_an_upload_that_breaks_off_is_not_seen_and_is_sent_later(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Mirror, path: str, content: bytes) -> None:
        raise ConnectionError("the wire is cut")

    here, there = Store(tmp_path / HERE), Store(tmp_path / THERE)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Mirror, "_write", broken)
        made = make(here, "checkpoint")
    assert "the wire is cut" in caplog.text and here.find("checkpoint") is not None
    assert list(remote.rglob("model.txt")) != [] and there.find("checkpoint") is None
    assert here.send_left_over() == []
    assert there.get("checkpoint").digest == made.digest
    assert list((here.home / "unsent_to_store").iterdir()) == []


def test_two_machines_that_made_the_same_key_never_mix_their_files(remote: Path, tmp_path: Path) -> None:
    first, second = Store(tmp_path / HERE), Store(tmp_path / THERE)
    second.mirror = None
    one, two = make(first, "checkpoint", text="one"), make(second, "checkpoint", text="two")
    first.mirror.send(two.path, two.manifest)
    assert Store(tmp_path / "third").get("checkpoint").digest == two.digest != one.digest


def test_what_is_corrupted_there_is_named_and_can_be_set_aside(remote: Path, tmp_path: Path) -> None:
    make(Store(tmp_path / HERE), "checkpoint")
    (file,) = remote.rglob("model.txt")
    file.write_text("other")
    there = Store(tmp_path / THERE)
    with pytest.raises(CorruptedArtifactError, match=r"model\.txt: corrupted .*--discard-corrupted"):
        there.get("checkpoint")
    there.set_aside("checkpoint")
    assert there.find("checkpoint") is None and list((remote / "corrupted").iterdir())


def test_a_mirror_that_cannot_be_read_stops_the_plan_and_one_that_goes_away_later_does_not(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Mirror) -> bool:
        raise ConnectionError("no route")

    make(Store(tmp_path / HERE), "checkpoint")
    known, unknown = Mirror(f"file://{remote}"), Mirror(f"file://{remote}")
    assert known.holds("checkpoint")
    monkeypatch.setattr(Mirror, "_exists", away)
    assert known.holds("checkpoint")
    with pytest.raises(UserError, match=r"MOPD_STORE: file://.*: cannot be read \(ConnectionError: no route\)"):
        unknown.holds("checkpoint")


def test_a_store_that_cannot_be_is_said_without_its_secrets() -> None:
    with pytest.raises(UserError, match="MOPD_STORE: nosuch://bucket") as caught:
        Mirror("nosuch://me:secret@bucket/models")
    assert "secret" not in str(caught.value)


def test_a_download_that_breaks_off_leaves_nothing(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Store(tmp_path / HERE), "checkpoint")
    there = Store(tmp_path / THERE)
    next(remote.rglob("deeper")).rename(remote / "elsewhere")
    with pytest.raises(UserError, match=r"MOPD_STORE: .* checkpoint cannot be read"):
        there.get("checkpoint")
    assert os.listdir(there.root / ".staging") == [] and not (there.root / "checkpoint").exists()


def test_removing_takes_the_manifest_first(remote: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / HERE)
    make(store, "checkpoint")
    assert json.loads((remote / "checkpoint" / "manifest.json").read_text())["key"] == "checkpoint"
    store.mirror.remove("checkpoint")
    assert not store.mirror.holds("checkpoint") and list(remote.iterdir()) == []


def rename_in_manifest(manifest: Path, name: str) -> None:
    """Let a manifest call its `model.txt` something else."""
    told = json.loads(manifest.read_text())
    told["files"][name] = told["files"].pop("model.txt")
    manifest.write_text(json.dumps(told))


@pytest.mark.parametrize("name", ["../../escaped.txt", "deeper/../../../escaped.txt", "ABSOLUTE", ".", ".."])
def test_a_manifest_that_names_files_outside_of_its_folder_is_refused_and_writes_nothing(
    remote: Path, tmp_path: Path, name: str
) -> None:
    """Whoever may write to the bucket must not write to the machines that read it."""
    name = str(tmp_path / "escaped.txt") if name == "ABSOLUTE" else name
    made = make(Store(tmp_path / HERE), "checkpoint")
    rename_in_manifest(remote / "checkpoint" / "manifest.json", name)
    # The file is there to be copied, where the name leads to in the shared folder.
    source = remote / "checkpoint" / made.digest / name
    if not source.exists():
        source.write_text("evil")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    there = Store(tmp_path / THERE)
    with pytest.raises(UserError, match=r"checkpoint/manifest\.json: names the file") as caught:
        there.get("checkpoint")
    assert repr(name) in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list((there.root / ".staging").iterdir()) == []


def test_so_is_one_that_stands_here(tmp_path: Path, remote: Path) -> None:
    store = Store(tmp_path / HERE)
    made = make(store, "checkpoint")
    (tmp_path / "other.txt").write_text("weights")
    rename_in_manifest(made.path / "manifest.json", "../../../other.txt")
    with pytest.raises(
        CorruptedArtifactError, match=r"manifest\.json: names the file '../../../other\.txt'.*--discard"
    ):
        store.get("checkpoint")
    with pytest.raises(UserError, match=r"names the file '../../../other\.txt'"):
        store.mirror.send(made.path, store.find("checkpoint").manifest)
