"""Split every layer of SmolLM2-135M-Instruct into experts, and heal the split by distillation from the dense model.

    python dev/heal/heal_base.py --out build/healed --device cuda --steps 3000
    python dev/heal/heal_base.py --out build/try --steps 20 --batch 2 --length 256 --own-rows 16      # on a CPU

The same command continues an interrupted run. OUT then has
    partition.safetensors   the split; it is computed once, because another machine may round differently
    own-text/               what the parent wrote
    training.safetensors    terms and optimizer state of the last checkpoint
    delta.safetensors       what was trained; with the partition at most 16 MB
    report.json, report.md  losses, choices and norms of experts on the held-out texts, before and after
    model/                  a transformers folder, for model.base
The weights are in bf16 on a GPU and in fp32 on a CPU; terms and optimizer are in fp32. The report is made with the
terms read back from delta.safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from delta import apply_delta, attach, check_size, save_delta
from distillation import Schedule, train
from quality import quality, table
from texts import in_rows, read_files, shipped, written_by

from flexperts.environment import environment
from flexperts.errors import ConfigError, FlexpertsError
from flexperts.files import json_text, read_json, sole_writer, write_json, write_text
from flexperts.modeling.placement import computing_device
from flexperts.smol_moe.build import card, convert, save_folder, to_stderr
from flexperts.smol_moe.calibrate import SMOL_MOE, TEXTS, SplitShape, compute_partition, read_texts
from flexperts.smol_moe.dense import DenseModel, load_dense
from flexperts.smol_moe.neuron_partition import NeuronPartition, load_neuron_partition, save_neuron_partition
from flexperts.smol_moe.sources import find_dense
from flexperts.smol_moe.upcycle import upcycle

OWN_ROWS = 20_000
ROUTER_SCALE = 0.3
"""Larger than in the shipped base: an optimizer step would change almost equal logits by more than they differ."""
FREE = ("out", "device", "save_every")
"""Options that may change when a run is continued."""


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--source", help="dense weights, as for flexperts base build")
    parser.add_argument("--seed", type=int, default=0)
    split = parser.add_argument_group("split")
    split.add_argument("--layers", type=int, nargs="+", help="default: all")
    split.add_argument("--shared", type=int, default=SMOL_MOE.shared, help="neurons of the shared expert")
    split.add_argument("--experts", type=int, default=SMOL_MOE.experts)
    split.add_argument("--top-k", type=int, default=SMOL_MOE.top_k)
    split.add_argument("--router-scale", type=float, default=ROUTER_SCALE, help="standard deviation of logits")
    texts = parser.add_argument_group("texts, besides the shipped ones")
    texts.add_argument("--texts", nargs="+", default=[], metavar="FILE", help=".txt, .md, or rows such as .jsonl")
    texts.add_argument("--own-rows", type=int, help=f"rows the parent writes; default {OWN_ROWS}, with --texts 0")
    texts.add_argument("--own-batch", type=int, default=256, help="rows the parent writes at once")
    texts.add_argument("--length", type=int, default=512, help="tokens of a row")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=3000)
    training.add_argument("--batch", type=int, default=16, help="rows of a step")
    training.add_argument("--rank", type=int, default=40, help="of the experts' terms")
    training.add_argument("--lr", type=float, default=1e-3, help="of the experts' terms")
    training.add_argument("--small-lr", type=float, default=1e-4, help="of routers, norms and shared gates")
    training.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    training.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    training.add_argument("--hidden", type=float, default=0.0, help="weight of the hidden states' distance")
    training.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    given = parser.parse_args(arguments)
    if given.own_rows is None:
        given.own_rows = 0 if given.texts else OWN_ROWS
    return given


def heal(given: argparse.Namespace) -> None:
    """Do what is missing in the folder of a run."""
    device = computing_device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = load_dense(find_dense(given.source, to_stderr))
    texts = read_files(given.texts, dense)
    held_out = [dense.tokenizer(text)["input_ids"] for text in read_texts(TEXTS / "held_out").values()]
    with sole_writer(given.out):
        settings = settle(given, dense, texts)
        partition = partition_of(given, dense)
        parent = convert(dense.model(), dtype).to(device).requires_grad_(False)
        model = convert(upcycle(dense.config, dense.state, partition), dtype).to(device)
        before = quality(parent, model, held_out)
        to_stderr(f"before: loss {before['loss']:.3f}, the parent's {before['parent_loss']:.3f}")
        terms = attach(model, given.rank, given.seed)
        size = check_size(terms, given.out / "partition.safetensors", given.rank)
        to_stderr(f"training {sum(t.numel() for t in terms.values()):,} values; with the partition {size:,} bytes")
        rows = in_rows([*texts, *shipped(dense), *own_text(given, parent, dense)], given.length)
        schedule = Schedule(**{name: getattr(given, name) for name in Schedule.__dataclass_fields__})
        train(parent, model, terms, rows, schedule, given.out / "training.safetensors", to_stderr)
        save_delta(given.out / "delta.safetensors", terms, settings)
        healed = upcycle(dense.config, dense.state, partition)
        apply_delta(healed, given.out / "delta.safetensors")
        after = quality(parent, convert(healed, dtype).to(device), held_out)
        found = {"before": before, "after": after, "bytes": size, "train_tokens": rows.numel()}
        write_json(given.out / "report.json", {**found, "settings": settings, "environment": environment()})
        write_text(given.out / "report.md", table(before, after) + "\n")
        print(table(before, after))
        write_model(given, healed.cpu(), dense, partition)


def own_text(given: argparse.Namespace, parent: Any, dense: DenseModel) -> list[list[int]]:
    """Return the rows that the parent writes."""
    sizes = {"rows": given.own_rows, "batch": given.own_batch, "length": given.length}
    return written_by(parent, dense, given.out / "own-text", **sizes, seed=given.seed, report=to_stderr)


def write_model(given: argparse.Namespace, healed: Any, dense: DenseModel, partition: NeuronPartition) -> None:
    """Write the transformers folder."""
    training = (
        f"Then low-rank terms of the experts (rank {given.rank}), routers and norms were trained for {given.steps} "
        "steps to predict\nwhat the dense model predicts."
    )
    folder = given.out / "model"
    folder.mkdir(exist_ok=True)
    save_folder(healed, dense.tokenizer, card(dense, partition, "smol-moe, healed", training), folder)
    to_stderr(f"wrote {folder}")


def settle(given: argparse.Namespace, dense: DenseModel, texts: list[list[int]]) -> dict[str, Any]:
    """Return what the run depends on; refuse a folder that was begun with something else."""
    settings = {name: value for name, value in vars(given).items() if name not in FREE}
    settings["texts"] = hashlib.sha256(json_text(texts).encode()).hexdigest()
    settings["source"] = dense.source.sha256
    file = given.out / "settings.json"
    if not file.exists():
        write_json(file, settings)
    held = read_json(file)
    if other := sorted(name for name in settings if held.get(name) != settings[name]):
        rule = f"it was begun with other values of {', '.join(other)}"
        raise ConfigError(f"--out {given.out}", rule, "use the values in its settings.json, or another folder")
    return settings


def partition_of(given: argparse.Namespace, dense: DenseModel) -> NeuronPartition:
    """Return the run's partition, computed from the shipped texts at first."""
    file = given.out / "partition.safetensors"
    if not file.exists():
        layers = tuple(given.layers or range(dense.config.num_hidden_layers))
        shape = SplitShape(layers, given.shared, given.experts, given.top_k, given.router_scale)
        to_stderr(f"splitting {len(layers)} layers")
        partition = compute_partition(dense, read_texts(), given.seed, shape)
        command = f"dev/heal/heal_base.py --seed {given.seed}"
        part = file.with_suffix(".part")
        save_neuron_partition(replace(partition, metadata={**partition.metadata, "command": command}), part)
        part.replace(file)
    return load_neuron_partition(file)


if __name__ == "__main__":
    try:
        heal(parsed(sys.argv[1:]))
    except FlexpertsError as error:
        sys.exit(str(error))
