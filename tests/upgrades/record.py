"""Records what a run and a silo leave on disk, as the present version writes it, for the versions after it.

    python tests/upgrades/record.py      # before a release; adds tests/upgrades/VERSION

Only what later versions read is kept, and nothing that names this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from flexperts import __version__
from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import payload_of, records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.silo import SiloPolicy
from flexperts.data.silos.generate import write_silos
from flexperts.deployment.kept import kept_runs
from flexperts.deployment.ledger import Ledger
from flexperts.deployment.settings import at_silos
from flexperts.deployment.worker import Worker
from flexperts.engines.run import run_federation
from flexperts.files import write_json
from flexperts.parameters.store import load_personal
from flexperts.recipe import load_silo, parse_recipe, recorded_recipe
from flexperts.server.checkpoint import load_server
from flexperts.status.status import RunStatus
from flexperts.testing import save_tiny_base

HERE = Path(__file__).parent
RUN, SILO = "0123456789abcdef" * 2, "clinic"
AGREEMENT = json.dumps({SILO: None})
_RECIPE = """
[model]
base = "tiny"
dtype = "float32"
precision = "fp32"
[data.clients]
clinic = { train = "rows/clinic/train.jsonl", test = "rows/clinic/test.jsonl" }
shop = { train = "rows/shop/train.jsonl", test = "rows/shop/test.jsonl" }
[lora]
rank = 2
[graft]
rank = 2
[training]
max_length = 640
local_steps = 2
[federation]
rounds = 2
[evaluation]
max_new_tokens = 2
[privacy]
noise = "local"
noise_multiplier = 4.0
"""
_SILO = f"""
name = "{SILO}"
state = "state"
base = "tiny"
dtype = "float32"
device = "cpu"
[data]
train = "rows/clinic/train.jsonl"
test = "rows/clinic/test.jsonl"
[policy]
min_score_rows = 1
"""
_KEPT = (
    "config.toml",
    "run_id",
    "rounds.jsonl",
    "summary.json",
    "checkpoint.safetensors",
    "partition.json",
    "personal",
)


def found(version: Path) -> dict[str, Any]:
    """Return what is read of the files of a version: the same, whichever version reads it.

    Args:
        version: Its folder.
    """
    run, state = RunDirectory.open(version / "run"), version / "state"
    server, ledger = load_server(run.checkpoint), Ledger(state, SiloPolicy())
    tensors, meta = load_personal(state / "runs" / RUN / "personal" / f"{SILO}.safetensors")
    told = RunStatus(run).look()
    return {
        "run": {key: told[key] for key in ("method", "state", "rounds", "bytes", "epsilon")},
        "id": run.run_id,
        "nll": {client: its["nll"] for client, its in run.summary(checked=True)["clients"].items()},
        "server": {"round": server.round, "clients": server.clients, "shared": _digest(server.shared.vector)},
        "personal": {"round": meta.round, "tensors": {n: _digest(t.numpy()) for n, t in tensors.items()}},
        "silo": [[its.run, its.method, its.round, _rounded(its.epsilon)] for its in kept_runs(state, SILO, ledger)],
        "replies": {kind: reply for kind, (_, reply) in ledger.runs[RUN].answered.items()},
    }


def _rounded(epsilon: float | None) -> float | None:
    return None if epsilon is None else round(epsilon, 9)  # it is computed anew, by SciPy


def _digest(values: Any) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def prepare(folder: Path) -> None:
    """Make the base, the rows and the silo's file in a folder, and change to it."""
    os.chdir(folder)
    save_tiny_base(Path("tiny"), max_position_embeddings=1024)
    write_silos(Path("rows"), 0, 8, 4)
    Path("silo.toml").write_text(_SILO)


def ask(worker: Worker, kind: str, content: Any) -> Any:
    """Return a worker's reply; both rounds of the recipe are asked."""
    recipe, kept = at_silos(parse_recipe(_RECIPE)), Path("state/runs") / RUN
    if (kept / "config.toml").exists():  # the server of a run sends the text with which the run began
        recipe = recipe.as_begun(recorded_recipe(kept))
    about = {"kind": kind, "run": RUN, "recipe": recipe.to_toml()}
    fields, reply = deserialize(worker.reply(serialize(about, content)))
    assert fields == {}, fields
    return reply


def continued() -> dict[str, torch.Tensor]:
    """Go on with the run in ``run`` and the silo in ``state``, a round each, and return the weights after it.

    Noise is of a fixed seed, since that of the operating system is another one each time.
    """

    def gaussian(size: int, std: float) -> Any:
        return np.random.default_rng(size).normal(0.0, std, size).astype(np.float32)

    with patch("flexperts.protection.noise.gaussian", gaussian):
        run_federation(parse_recipe(_RECIPE, ["federation.rounds=3"]), "run", resume=True)
        worker = Worker(load_silo("silo.toml"))
        payload = payload_of(ask(worker, "query.initial", records({"agreement": AGREEMENT})), SILO)
        reply = ask(worker, "train", records({"round": 2, "agreement": AGREEMENT}, payload=payload))
    found = {"run.shared": load_server(Path("run/checkpoint.safetensors")).shared.vector}
    found["silo.sent"] = payload_of(reply, SILO).vector
    tensors = {name: torch.from_numpy(vector.copy()) for name, vector in found.items()}
    for place in (Path("run"), Path("state/runs") / RUN):
        personal, meta = load_personal(place / "personal" / f"{SILO}.safetensors")
        assert meta.round == (3 if place == Path("run") else 2)
        tensors |= {f"{place.parts[0]}.{name}": tensor for name, tensor in personal.items()}
    return tensors


def record(folder: Path) -> None:
    """Write a version's files, what is read of them, and how they go on."""
    prepare(folder)
    run_federation(parse_recipe(_RECIPE), "run")
    worker = Worker(load_silo("silo.toml"))
    ask(worker, "query.join", records({}))
    payload = payload_of(ask(worker, "query.initial", records({"agreement": AGREEMENT})), SILO)
    request = {"round": 1, "agreement": AGREEMENT}
    ask(worker, "train", records(request, payload=payload))
    scored = request | {"states": ["global", "personalized"], "answers": False}
    ask(worker, "evaluate", records(scored, payload=payload))

    version = HERE / __version__
    version.mkdir()
    for name in _KEPT:
        copy = shutil.copytree if (Path("run") / name).is_dir() else shutil.copy
        (version / "run").mkdir(exist_ok=True)
        copy(Path("run") / name, version / "run" / name)
    shutil.copytree(
        "state", version / "state", ignore=shutil.ignore_patterns("worker.*", "requests.jsonl", "predictions")
    )
    write_json(version / "found.json", found(version), indent=1)
    save_file(continued(), version / "continued.safetensors")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
