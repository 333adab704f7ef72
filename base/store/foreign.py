"""Checks an external checkpoint before a library reads it. Free of torch and transformers.

Its files are untrusted. They must be regular and of bounded size; the config must describe a model of plausible size
that the weights can fill; and the header of a weights file must describe exactly that file.
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from base.documents import DocumentError, parse_json, read_object
from base.errors import UserError

CONFIG = "config.json"
MEGABYTE = 2**20
# Limits of files that are read completely; the largest published ones have a tenth of these sizes.
MOST_BYTES = {
    CONFIG: 4 * MEGABYTE,
    "generation_config.json": MEGABYTE,
    "special_tokens_map.json": MEGABYTE,
    "tokenizer_config.json": 64 * MEGABYTE,
    "added_tokens.json": 64 * MEGABYTE,
    "vocab.json": 128 * MEGABYTE,
    "tokenizer.json": 512 * MEGABYTE,
}
READ_AS_OBJECTS = (CONFIG, "generation_config.json", "tokenizer_config.json")
MOST_TEMPLATE_BYTES = MEGABYTE
MOST_HEADER_BYTES = 64 * MEGABYTE
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# A config's sizes, by all names that architectures use for them, and the largest plausible value of each.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
VOCABULARY = "vocab_size"
MOST_OF = {
    **dict.fromkeys(LAYERS, 1000),
    **dict.fromkeys(WIDTHS, 2**17),
    VOCABULARY: 2**24,
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 2**14),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim"), 2**20),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**12),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31),
}
# Bits of each type of weights.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
# Four-bit weights are packed, eight per number.
MOST_PACKED = 8


def check_folder(key: str, folder: Path) -> None:
    """Check that a folder may be read as a checkpoint.

    Args:
        key: The run file's key, or the node, for messages.
        folder: The folder of `config.json` and the safetensors files.

    Raises:
        UserError: a file is missing, damaged, not regular, too large, or has implausible content.
    """
    try:
        _check_files(folder)
        objects = {name: _object(folder / name) for name in READ_AS_OBJECTS if (folder / name).exists()}
        if CONFIG not in objects:
            raise DocumentError(f"no {CONFIG}; write a folder as save_pretrained does")
        config = objects[CONFIG]
        if fault := config_fault(config):
            raise DocumentError(f"{CONFIG}: {fault}")
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise DocumentError(f"no tokenizer: none of {', '.join(TOKENIZERS)}")
        if not any(folder.glob("*.safetensors")):
            raise DocumentError("no safetensors file; weights are read only from those")
        values = sum(math.prod(shape) for path in sorted(folder.glob("*.safetensors")) for shape in shapes(path))
        if fault := _fills(config, values):
            raise DocumentError(f"{CONFIG}: {fault}")
    except DocumentError as error:
        raise UserError(f"{key}: {folder}: {error}") from None


def config_fault(config: Mapping[str, Any], place: str = "") -> str | None:
    """The first implausible value of a model's config, with its key; None if there is none.

    Args:
        config: The content of `config.json`; nested configs are checked too.
        place: Prefix of the keys, for a nested config.
    """
    if not place and not isinstance(config.get("model_type"), str):
        return "it names no model_type"
    for name, value in config.items():
        where = f"{place}{name}"
        if isinstance(value, Mapping):
            if fault := config_fault(value, f"{where}."):
                return fault
            continue
        if name not in MOST_OF or value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 < each <= MOST_OF[name]:
                return f"{where} is {each!r:.40}; it must be a whole number from 1 to {MOST_OF[name]:,}"
    return None


def shapes(path: Path) -> Iterator[tuple[int, ...]]:
    """The shape of each tensor in a safetensors file.

    Raises:
        DocumentError: its header does not describe the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise DocumentError(f"{path.name}: its header claims {length:,} bytes, the file has {size:,}")
        text = file.read(length).decode("utf-8", "replace")
    header = _named(path.name, lambda: parse_json(text))
    if not isinstance(header, dict):
        raise DocumentError(f"{path.name}: its header is not a JSON object")
    room = size - 8 - length
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        shape = _shape(facts, room)
        if shape is None:
            raise DocumentError(f"{path.name}: tensor {name!r:.60} does not fit the file: {json.dumps(facts):.120}")
        yield shape


def _shape(facts: Any, room: int) -> tuple[int, ...] | None:
    """A tensor's shape, if its type, shape and position in the file agree; else None."""
    if not isinstance(facts, dict):
        return None
    bits, shape, place = BITS.get(str(facts.get("dtype"))), facts.get("shape"), facts.get("data_offsets")
    if bits is None or not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        return None
    count = 1
    for size in shape:
        count *= size
        if count > room * 8:
            return None
    begin, end = place
    fits = begin <= end <= room and (end - begin) * 8 == count * bits
    return tuple(shape) if fits else None


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _check_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        try:
            found = path.stat()
        except (OSError, RuntimeError):
            raise DocumentError(f"{path.name} is a broken link") from None
        if stat.S_ISDIR(found.st_mode) and path.name not in MOST_BYTES and path.suffix != ".safetensors":
            continue
        if not stat.S_ISREG(found.st_mode):
            raise DocumentError(f"{path.name} is not a regular file")
        most = MOST_TEMPLATE_BYTES if path.suffix == ".jinja" else MOST_BYTES.get(path.name)
        if most is not None and found.st_size > most:
            raise DocumentError(f"{path.name} has {found.st_size:,} bytes, the limit is {most:,}")


def _object(path: Path) -> dict[str, Any]:
    return dict(_named(path.name, lambda: read_object(path, MOST_BYTES[path.name])))


def _named(name: str, read: Any) -> Any:
    try:
        return read()
    except DocumentError as error:
        raise DocumentError(f"{name}: {error}") from None


def _fills(config: Mapping[str, Any], values: int) -> str | None:
    """Why this number of weight values is too small for a config; None if it is plausible."""
    text = config.get("text_config")
    sizes = {**config, **(text if isinstance(text, Mapping) else {})}
    layers = next((sizes[name] for name in LAYERS if isinstance(sizes.get(name), int)), 1)
    width = next((sizes[name] for name in WIDTHS if isinstance(sizes.get(name), int)), 1)
    vocabulary = sizes[VOCABULARY] if isinstance(sizes.get(VOCABULARY), int) else 1
    least = width * max(layers, vocabulary // MOST_PACKED)
    if values >= least:
        return None
    return (
        f"{layers:,} layers of width {width:,} and a vocabulary of {vocabulary:,} take {least:,} values or more, the "
        f"weights have {values:,}"
    )
