"""A run on a base of a real size with random weights: memory against its estimate, seconds, bytes.

    python benchmarks/large_model.py --scratch /tmp/large --out docs/results/large-model
    python benchmarks/large_model.py --scratch /tmp/small --layers 2 --experts 4                     # a trial
    python benchmarks/large_model.py --scratch /tmp/qwen --preset qwen1.5-moe-a2.7b --device cuda    # on a GPU

The base is written layer by layer in the layout that most of the hub's checkpoints have, one tensor per expert and
matrix, so that only one layer is in memory at a time. Then `flexperts run` trains FLEx for two silos and two rounds
in a separate process, whose memory is measured from outside. An existing base is used again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexperts.artifacts import RunDirectory
from flexperts.costs.activations import row_lengths
from flexperts.costs.models import describe
from flexperts.costs.preflight import Estimator
from flexperts.data.clients import load_clients
from flexperts.environment import environment
from flexperts.files import write_json, write_text
from flexperts.modeling.skeleton import skeleton
from flexperts.recipe import load_recipe
from flexperts.seeding import generator
from flexperts.testing import byte_tokenizer

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe-half": ("olmoe-1b-7b", {"num_experts": 32}),
    "qwen1.5-moe-a2.7b": ("qwen1.5-moe-a2.7b", {}),
}
"""Name -> (config that ships, what differs)."""
SILOS = {"north": "tides and harbours", "south": "vineyards and wells"}
RECIPE = """
seed = {seed}
[model]
base = "{base}"
device = "{device}"
quantization = "{quantization}"
[data.clients.north]
train = "{folder}/north-train.jsonl"
test = "{folder}/north-test.jsonl"
[data.clients.south]
train = "{folder}/south-train.jsonl"
test = "{folder}/south-test.jsonl"
[training]
local_steps = {steps}
batch_size = 2
max_length = 128
gradient_checkpointing = {checkpointing}
[graft]
rank = {rank}
[federation]
rounds = 2
[evaluation]
rows = 2
max_new_tokens = 2
batch_size = 2
"""


def write_base(folder: Path, preset: str, layers: int | None, experts: int | None, seed: int) -> int:
    """Write a random base as an ordinary sharded checkpoint; return its parameters."""
    name, changes = PRESETS[preset]
    config = describe(name).config
    asked = {"num_hidden_layers": layers, "num_experts": experts}
    for key, value in (changes | {k: v for k, v in asked.items() if v is not None}).items():
        setattr(config, key, value)
    config.num_experts_per_tok = min(config.num_experts_per_tok, config.num_experts)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 256, 257, 258  # the byte tokenizer's
    model, places = skeleton(config, "bfloat16"), {}
    count = sum(p.numel() for p in model.parameters())
    if (folder / "tokenizer.json").exists():  # written last
        return count
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, torch.Size]] = {}
    for parameter, value in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", parameter)
        shards.setdefault(layer[1] if layer else "rest", {})[parameter] = value.shape
    for shard, shapes in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = dict(each for item in shapes.items() for each in _tensors(*item, seed))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return count


def _tensors(name: str, shape: torch.Size, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a parameter's tensors as checkpoints name them: experts one by one, gate and up apart."""
    if len(shape) == 1:
        yield name, torch.ones(shape, dtype=torch.bfloat16)
        return
    value = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator(seed, name))
    if len(shape) == 2:
        yield name, value
        return
    before, _, kind = name.rpartition(".")
    for index, expert in enumerate(value):
        halves = zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
        for part, matrix in halves if kind == "gate_up_proj" else [(kind, expert)]:
            yield f"{before}.{index}.{part}.weight", matrix.contiguous()


def write_rows(folder: Path) -> None:
    """Write four train and four test rows a silo, of about seventy tokens."""
    for silo, topic in SILOS.items():
        for split in ("train", "test"):
            rows = ({"instruction": f"{split} {n}", "response": f"{silo} {n}: {topic}"} for n in range(4))
            write_text(folder / f"{silo}-{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def watched_run(recipe: Path, out: Path) -> dict[str, Any]:
    """Run the recipe in a separate process and measure its memory ten times a second."""
    command = [str(Path(sys.executable).with_name("flexperts")), "run", str(recipe), "--out", str(out)]
    started, seen = time.monotonic(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
        for key in seen:
            if found := re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE):
                seen[key] = max(seen[key], 1024 * int(found[1]))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"the run failed ({process.returncode})")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "anonymous_peak": seen["RssAnon"],
        "peak": seen["VmHWM"],
    }


def main() -> None:
    """Write the base, estimate, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for base and run")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--preset", choices=PRESETS, default="olmoe-half")
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--experts", type=int, help="fewer experts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", choices=("none", "int8", "nf4"), default="none")
    parser.add_argument("--rank", default="full", help="graft.rank")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.scratch / "run", ignore_errors=True)
    started = time.monotonic()
    count = write_base(given.scratch / "base", given.preset, given.layers, given.experts, given.seed)
    print(f"{count:,} parameters written in {time.monotonic() - started:.0f} s", flush=True)
    write_rows(given.scratch)
    rank = given.rank if given.rank.isdigit() else json.dumps(given.rank)
    text = RECIPE.format(
        **vars(given) | {"rank": rank, "checkpointing": str(given.checkpointing).lower()},
        base=given.scratch.resolve() / "base",
        folder=given.scratch.resolve(),
    )
    recipe = given.scratch / "recipe.toml"
    write_text(recipe, text)
    config = load_recipe(recipe)
    lengths = row_lengths(config, load_clients(config.data, config.seed))
    estimate = Estimator(config.model.base, list(SILOS), lengths).estimate(config)
    watched = watched_run(recipe, given.scratch / "run")
    summary = RunDirectory.open(given.scratch / "run").summary()
    result = {
        "preset": given.preset,
        "parameters": count,
        "settings": {k: v for k, v in vars(given).items() if k not in ("scratch", "out")},
        "estimate": {need.phase: need.parts | {"together": need.total} for need in estimate.needs},
        "estimated_peak": estimate.peak.total,
        "measured": watched | {"run_peak": summary["peak_memory"]},
        "estimate_to_run_peak": round(estimate.peak.total / summary["peak_memory"], 4),
        "seconds": summary["seconds"],
        "bytes": summary["bytes"],
        "trained": summary["parameters"],
        "environment": environment(),
    }
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        write_json(given.out / "results.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
