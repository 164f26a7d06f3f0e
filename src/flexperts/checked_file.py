"""Safetensors files with a checksum: named tensors and one JSON value. A file that has changed is refused.

The safetensors format detects a truncated file, but not a changed byte in a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flexperts.errors import ArtifactError
from flexperts.files import damaged, write_bytes


def write_sealed(path: Path, kind: str, tensors: Mapping[str, Tensor], meta: Any) -> None:
    """Write tensors and a JSON value, atomically.

    Args:
        path: The file.
        kind: Name and version of the format.
        tensors: The tensors; they must not share memory.
        meta: Plain JSON values.
    """
    held = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    text = json.dumps(meta)
    seal = {"meta": text, "sha256": _digest(kind, text, held)}
    # Only one key: safetensors writes keys in random order, and equal states must give equal files.
    write_bytes(path, save(held, metadata={kind: json.dumps(seal)}))


def read_sealed(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the JSON value of a file that ``write_sealed`` wrote."""
    seal, tensors = _read(path, kind, with_tensors=True)
    try:
        text, digest = str(seal["meta"]), seal["sha256"]
        value = json.loads(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"its metadata cannot be read ({error!r})") from error
    if digest != _digest(kind, text, tensors):
        raise damaged(path, "its checksum does not fit")
    return tensors, value


def read_meta(path: Path, kind: str) -> Any:
    """Return the JSON value of a sealed file; tensors are not read, so the checksum is not checked."""
    seal, _ = _read(path, kind, with_tensors=False)
    try:
        return json.loads(seal["meta"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"its metadata cannot be read ({error!r})") from error


def _read(path: Path, kind: str, *, with_tensors: bool) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
        if kind in header:
            return json.loads(header[kind]), tensors
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}", "there is no such file", "give the directory of a run") from error
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise damaged(path, error) from error
    raise ArtifactError(
        f"{path}", f"it is not of format {kind}", "give a file that this version of flexperts wrote"
    )


def _digest(kind: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{kind}\0{text}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
