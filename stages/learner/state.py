"""The saved state of a stage, as safetensors and JSON, so that reading a home runs no code.

The files of torch, accelerate and torch.distributed.checkpoint are pickles, and reading a pickle can run any code.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def write_state(tree: Any, folder: Path, name: str) -> None:
    """Write nested mappings and lists of tensors, numbers, text and None.

    Args:
        tree: Keys of mappings are text or whole numbers; a tuple is read back as a list, and a tensor that occurs
            several times as one tensor.
        folder: Folder of the files `NAME.safetensors` and `NAME.json`.
        name: `NAME`.

    Raises:
        TypeError: the tree contains a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    # id of a tensor -> its key: files of safetensors have no tensors that share memory.
    written: dict[int, str] = {}

    def encoded(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in written:
                written[id(value)] = str(len(tensors))
                tensors[written[id(value)]] = value.detach().contiguous()
            return {"tensor": written[id(value)]}
        if isinstance(value, dict):
            return {"items": [[key, encoded(each)] for key, each in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [encoded(each) for each in value]}
        return value

    facts = json.dumps(encoded(tree))
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(facts)


def read_state(folder: Path, name: str) -> Any:
    """Read what `write_state` wrote; tensors are on the CPU."""
    tensors = load_file(folder / f"{name}.safetensors")

    def decoded(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "items" in value:
            return {key: decoded(each) for key, each in value["items"]}
        return [decoded(each) for each in value["list"]]

    return decoded(json.loads((folder / f"{name}.json").read_text()))


def is_state(folder: Path, name: str) -> bool:
    """Whether a folder has a state in this format; states of earlier versions are not read."""
    return (folder / f"{name}.json").exists() and (folder / f"{name}.safetensors").exists()
