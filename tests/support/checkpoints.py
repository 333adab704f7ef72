"""Folders that planning takes for a checkpoint made elsewhere; nothing can be loaded from them."""

import json
import struct
from pathlib import Path


def pretend_checkpoint(folder: Path, **config: object) -> Path:
    """Write a config, a tokenizer's file and one tensor of a number; what stands in the folder already stays."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_text("{}")
    return folder
