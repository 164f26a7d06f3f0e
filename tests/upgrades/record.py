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
from flexperts.recipe import load_silo, parse_recipe
from flexperts.server.checkpoint import load_server
from flexperts.status.status import RunStatus
from flexperts.testing import save_tiny_base

HERE = Path(__file__).parent
RUN, SILO = "0123456789abcdef" * 2, "clinic"
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


def record(folder: Path) -> None:
    """Write a version's files and what is read of them."""
    os.chdir(folder)
    save_tiny_base(Path("tiny"), max_position_embeddings=1024)
    write_silos(Path("rows"), 0, 8, 4)
    config = parse_recipe(_RECIPE)
    run_federation(config, "run")
    Path("silo.toml").write_text(_SILO)
    worker, recipe = Worker(load_silo("silo.toml")), at_silos(config).to_toml()

    def ask(kind: str, content: Any) -> Any:
        fields, reply = deserialize(worker.reply(serialize({"kind": kind, "run": RUN, "recipe": recipe}, content)))
        assert fields == {}, fields
        return reply

    agreement = json.dumps({SILO: None})
    ask("query.join", records({}))
    payload = payload_of(ask("query.initial", records({"agreement": agreement})), SILO)
    request = {"round": 1, "agreement": agreement}
    ask("train", records(request, payload=payload))
    ask("evaluate", records(request | {"states": ["global", "personalized"], "answers": False}, payload=payload))

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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
