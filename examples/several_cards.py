"""A run of a base that does not fit one card: FSDP2 divides its layers over processes, one process per card.

    torchrun --nproc-per-node 2 examples/several_cards.py model.base=FOLDER training.gradient_checkpointing=true

Every process computes the whole run, on the same rows; rank 0 keeps its run directory, the others delete theirs.
This saves memory and no time. docs/large-models.md says what works and what is untested.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from flexperts import load_recipe, run_federation
from flexperts.client.workspace import Workspace
from flexperts.modeling.cards import shard_layers
from flexperts.modeling.load import load_base

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def main(out: Path, device: torch.device, *overrides: str) -> None:
    config = load_recipe(RECIPE, overrides)
    base = load_base(config.model.model_copy(update={"device": "cpu"}))
    shard_layers(base.model, device)
    with TemporaryDirectory() as folder:
        kept = out if dist.get_rank() == 0 else Path(folder) / "run"
        summary = run_federation(config, kept, workspace=Workspace(config, base))
    check_same(str(summary["clients"]))
    if dist.get_rank() == 0:
        mean = summary["mean"]["nll"]
        print(f"NLL: {mean['zero_shot']:.3f} untouched, {mean['global']:.3f} global; everything is in {out}")


def own_device() -> torch.device:
    """Join the processes that torchrun started; return this one's card, or the CPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for the next line
    torch.use_deterministic_algorithms(True)  # an answer that ends earlier in one process would stop the others
    dist.init_process_group()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def check_same(scores: str) -> None:
    """Refuse a result if another process has other scores."""
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, scores)
    if any(other != scores for other in everyone):
        raise SystemExit("the processes computed different scores: do not use this run")


if __name__ == "__main__":
    main(Path("runs/several-cards"), own_device(), *sys.argv[1:])
    dist.destroy_process_group()
