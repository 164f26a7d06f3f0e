"""A run through relays and workers ends bit for bit as the run of the same recipe in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from flexperts.artifacts import RunDirectory
from flexperts.config.run import RunConfig
from flexperts.deployment.home import HomeModel
from flexperts.deployment.settings import at_silos
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import run_federation
from flexperts.errors import ArtifactError
from flexperts.finished.trained import TrainedRun
from flexperts.observer import Observer
from flexperts.parameters.store import load_personal
from flexperts.recipe import load_silo
from flexperts.server.checkpoint import load_server
from flexperts.server.serve import serve
from flexperts.studies.collect import collect_run
from flexperts.testing import METHOD_SETTINGS

from .asking import serving, through_relay

SILOS = ("clinic", "law_firm")
SHORT = ("training.local_steps=2", "lora.dropout=0.1", "evaluation.rows=2", "federation.min_clients=2")


def silo_at(folder: Path, rows: Path, base: Path) -> Path:
    folder.mkdir()
    path = folder / "silo.toml"
    head = f'name = "{folder.name}"\nstate = "state"\nbase = "{base}"\ndtype = "float32"\ndevice = "cpu"\n'
    sides = "\n".join(f'{side} = "{rows / folder.name / side}.jsonl"' for side in ("train", "test"))
    path.write_text(f"{head}[data]\n{sides}\n[policy]\nmin_score_rows = 2\n")
    return path


PACKED = ("compression.kind=top_k_sign", "compression.downlink=int4", "evaluation.every=1")


@pytest.mark.parametrize("method", ["flex", "feddpa_t", "fedalt", "fedlease", "fedper"])
def test_workers_and_one_process_end_alike(
    recipe: Callable[..., RunConfig], tmp_path: Path, silos: Path, tiny_base: Path, method: str
) -> None:
    files = {
        name: f"{{train = '{silos}/{name}/train.jsonl', test = '{silos}/{name}/test.jsonl'}}" for name in SILOS
    }
    clients, more = ", ".join(f"{name} = {sides}" for name, sides in files.items()), METHOD_SETTINGS.get(method, ())
    more = (*more, *(PACKED if method == "fedper" else ()))
    config = recipe(f"data={{clients = {{{clients}}}}}", f"method.name={method}", *more, *SHORT)
    summary = run_federation(config, tmp_path / "one")
    paths = {name: silo_at(tmp_path / name, silos, tiny_base) for name in SILOS}
    handed = at_silos(config)
    nodes = {n: through_relay(paths[name], handed.to_toml()) for n, name in enumerate(SILOS, 1)}
    server = RunDirectory.create(tmp_path / "server", handed.to_toml())
    workers = {name: Worker(load_silo(path)) for name, path in paths.items()}
    with ExitStack() as stack:
        for name, worker in workers.items():
            make_private(tmp_path / name / "state")
            stack.enter_context(serving(tmp_path / name / "state", worker.reply))
        grid = InProcessGrid(nodes)
        serve(grid, handed, server, Observer())
    assert {name: worker.loads for name, worker in workers.items()} == dict.fromkeys(SILOS, 1)
    ours, theirs = load_server(server.checkpoint), load_server(tmp_path / "one" / "checkpoint.safetensors")
    assert ours.round == theirs.round == 2
    assert ours.shared.vector.tobytes() == theirs.shared.vector.tobytes()
    assert server.summary()["clients"] == summary["clients"]
    check_models_at_home(paths, tmp_path / "one", server.run_id)
    check_reports(server)
    for name in SILOS:
        own = load_personal(tmp_path / name / "state" / "runs" / server.run_id / "personal" / f"{name}.safetensors")
        same = load_personal(tmp_path / "one" / "personal" / f"{name}.safetensors")
        assert own[1] == same[1]
        assert own[0].keys() == same[0].keys()
        assert all(tensor.equal(same[0][key]) for key, tensor in own[0].items())


def check_models_at_home(paths: dict[str, Path], one: Path, run: str) -> None:
    """A silo's own model answers as the same client of the run in one process does."""
    asked = ("Summarise the note.", "The cabinet needs a new code.")
    for name, path in paths.items():
        home = HomeModel(load_silo(path), run)
        for state in home.method.states:
            answer = TrainedRun(one).generate(name, *asked, state=state)
            assert home.generate(*asked, state=state) == answer
        assert answer
    with pytest.raises(ArtifactError, match="has not yet received its final shared weights"):
        HomeModel(load_silo(path), "0" * 32)


def check_reports(server: RunDirectory) -> None:
    """The server's directory holds no answers, and is reported without them."""
    comparison = collect_run(server.path)
    assert comparison["examples"] == {}
    assert len(comparison["clients"]) == len(SILOS)
