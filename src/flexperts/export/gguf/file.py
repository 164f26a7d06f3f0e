"""Writing a GGUF file, and reading it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from torch import Tensor

from flexperts.errors import ArtifactError
from flexperts.export.gguf.architectures import Architecture

_Kind = gguf.GGMLQuantizationType
_KINDS = {"float32": _Kind.F32, "float16": _Kind.F16, "bfloat16": _Kind.BF16, "q8_0": _Kind.Q8_0}
_FILES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32
"""Values that have one scale in Q8_0."""


@dataclass(frozen=True)
class ReadBack:
    """A file whose weights were read back and compared with the model's.

    Args:
        tensors: Number of tensors.
        dtype: Their type.
    """

    tensors: int
    dtype: str

    @property
    def is_coarse(self) -> bool:
        """Whether a difference remains that needs an explanation; here none does."""
        return False

    def __str__(self) -> str:
        return (
            f"all {self.tensors} tensors read back from the file, within the rounding of {self.dtype}; "
            "llama.cpp, which is not installed here, did not load it"
        )


@contextmanager
def opened(path: Path, architecture: Architecture) -> Iterator[gguf.GGUFWriter]:
    """Yield the writer of a file, and close it."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.kind])
    try:
        yield writer
    finally:
        with suppress(OSError):  # the disk is full, and an error says so already
            writer.close()


def write_weights(writer: gguf.GGUFWriter, architecture: Architecture, dtype: str) -> None:
    """Write a model's lengths and weights; one tensor at a time is in memory.

    Args:
        writer: The file's writer, with all other fields.
        architecture: The model.
        dtype: float32, float16, bfloat16 or q8_0. Vectors and routers are always float32.
    """
    for name, value in architecture.lengths.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_file_type(_FILES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in architecture.tensors():
        kind = _kind(name, tensor, dtype)
        shape = quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in architecture.tensors():
        writer.write_tensor_data(encoded(_array(tensor), _kind(name, tensor, dtype)))


def encoded(values: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    """Return the bytes of values in a type."""
    # Of a block whose values are all near 0, 1 over the scale overflows; what is stored is a scale of 0.
    with np.errstate(over="ignore", invalid="ignore"):
        coded: NDArray[Any] = quantize(values, kind)
    return coded


def read_back(path: Path, architecture: Architecture, dtype: str) -> ReadBack:
    """Compare a file's weights with the model's.

    Raises:
        ArtifactError: A weight is missing, or differs by more than its type rounds.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    count = 0
    for name, tensor in architecture.tensors():
        stored, count = found.pop(name, None), count + 1
        if stored is None or not _is_rounded(_array(tensor), _decoded(stored), stored.tensor_type):
            rule = f"{name} in it differs from the model's by more than {dtype} rounds"
            raise ArtifactError(f"{path.name}", rule, "use --dtype float32, and report this as an issue")
    assert not found
    return ReadBack(count, dtype)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().contiguous().numpy()
    return array


def _decoded(stored: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = dequantize(stored.data, stored.tensor_type)
    return values


def _kind(name: str, tensor: Tensor, dtype: str) -> Any:
    """Return the type of one tensor: as llama.cpp's converter has it."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return _Kind.F32
    return _Kind.F16 if dtype == "q8_0" and tensor.shape[-1] % _BLOCK else _KINDS[dtype]


def _is_rounded(values: NDArray[np.float32], stored: NDArray[np.float32], kind: Any) -> bool:
    """Return whether stored values are a type's rounding of values."""
    if stored.shape != values.shape:
        return False
    size = np.abs(values)
    if kind == _Kind.Q8_0:  # half a step of 1/127 of the block's largest value, and the rounding of that step
        blocks = size.reshape(*size.shape[:-1], -1, _BLOCK)
        largest = np.broadcast_to(blocks.max(-1, keepdims=True), blocks.shape).reshape(size.shape)
        most = largest * (1 / 254 + 2.0**-10) + 127 * 2.0**-25
    else:
        most = {_Kind.F32: 0 * size, _Kind.F16: size * 2.0**-11 + 2.0**-25, _Kind.BF16: size * 2.0**-8}[kind]
    return bool((np.abs(stored - values) <= most).all())
