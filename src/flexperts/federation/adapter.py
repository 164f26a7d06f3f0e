"""The shared weights as an ordinary PEFT adapter folder, written without a model."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from flexperts.artifacts import write_bytes, write_text
from flexperts.errors import ArtifactError
from flexperts.parameters.vector import Manifest, Vector, flatten


def write_adapter(folder: Path, config_json: str, manifest: Manifest, vector: Vector) -> None:
    """Write adapter_config.json and adapter_model.safetensors; a method that shares nothing writes nothing.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    if not manifest.size:
        return
    write_text(folder / "adapter_config.json", config_json)
    weights = save({n: t.contiguous() for n, t in manifest.unflatten(vector).items()}, metadata={"format": "pt"})
    write_bytes(folder / "adapter_model.safetensors", weights)


def read_adapter(folder: Path, manifest: Manifest) -> Vector:
    """Read a shared adapter back as the flat vector of ``manifest``.

    Raises:
        ArtifactError: The folder holds no adapter, a damaged one, or one of other shapes.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}", "there is no shared adapter", "give a finished run's directory") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}", f"it is damaged ({error})", "restore it from a copy or run again") from error
    if Manifest.of(tensors) != manifest:
        raise ArtifactError(
            f"{path}", "its tensors are not those of the run's recipe", "use the run's own config.toml"
        )
    return flatten(tensors)
