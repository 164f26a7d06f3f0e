"""Secure aggregation between workers: kept state, repeated requests, identities, what a silo requires."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.client.masking import identity_of
from flexperts.communication.messages import info_of, records
from flexperts.communication.secure.ciphers import identity_key
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment.settings import at_silos
from flexperts.deployment.state import identity_file, make_private
from flexperts.deployment.worker import Worker
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, FederationError
from flexperts.observer import Observer
from flexperts.recipe import load_silo
from flexperts.server.checkpoint import load_server

from .scripted_grid import ScriptedGrid, drop, run_on

Recipe = Callable[..., RunConfig]
SILOS = ("clinic", "help_desk", "law_firm")
SHORT = ("training.local_steps=1", "evaluation.rows=2", "federation.min_clients=3", "training.lr=1e-4")
SECURE = ("privacy.aggregation=secure", "privacy.clip=100", "federation.max_norm_ratio=off")


class Notices(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []

    def notice(self, text: str) -> None:
        self.told.append(text)


class Served:
    """A worker in the place of a scripted silo: what reaches it is bytes, as from a relay."""

    def __init__(self, silo: SiloConfig, recipe: str) -> None:
        self.silo, self.recipe, self.name = silo, recipe, silo.name
        self.seen = Notices()
        make_private(Path(silo.state))
        self.restart()

    def restart(self) -> None:
        self.worker = Worker(self.silo, self.seen)

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        fields = {"kind": kind, "run": str(info_of(content)["run"]), "recipe": self.recipe}
        told, reply = deserialize(self.worker.reply(serialize(fields, content)))
        if "error" in told:
            return records({"client": self.name, "error": told["error"]})
        return reply


def silo_at(folder: Path, rows: Path, base: Path, more: str = "") -> SiloConfig:
    folder.mkdir(parents=True)
    head = f'name = "{folder.name}"\nstate = "state"\nbase = "{base}"\ndtype = "float32"\ndevice = "cpu"\n'
    sides = "\n".join(f'{side} = "{rows / folder.name / side}.jsonl"' for side in ("train", "test"))
    (folder / "silo.toml").write_text(f"{head}[data]\n{sides}\n[policy]\nmin_score_rows = 2\n{more}\n")
    return load_silo(folder / "silo.toml")


@pytest.fixture
def config(recipe: Recipe, silos: Path) -> RunConfig:
    files = {n: f"{{train = '{silos}/{n}/train.jsonl', test = '{silos}/{n}/test.jsonl'}}" for n in SILOS}
    clients = ", ".join(f"{name} = {sides}" for name, sides in files.items())
    return recipe(f"data={{clients = {{{clients}}}}}", *SHORT)


def secured(config: RunConfig, **privacy: Any) -> RunConfig:
    settings = {"aggregation": "secure", "clip": 100.0, **privacy}
    parts = {
        "privacy": config.privacy.model_copy(update=settings),
        "federation": config.federation.model_copy(update={"max_norm_ratio": "off"}),
    }
    return at_silos(config.model_copy(update=parts))


def served(config: RunConfig, folder: Path, rows: Path, base: Path, more: str = "") -> list[Served]:
    return [Served(silo_at(folder / name, rows, base, more), config.to_toml()) for name in SILOS]


def test_workers_end_near_the_plain_run_and_say_which_silos_are_new(
    config: RunConfig, tmp_path: Path, silos: Path, tiny_base: Path
) -> None:
    """A lost reply ends its round, which workers that have restarted then repeat in another session."""
    run_federation(config, tmp_path / "plain")
    secure = secured(config, agreement=True)
    workers = served(secure, tmp_path, silos, tiny_base)
    grid = ScriptedGrid(*workers)  # type: ignore[arg-type]
    grid.faults["train", 2, "law_firm"] = drop
    with pytest.raises(FederationError, match="2 silos are left in the round"):
        run_on(grid, secure, tmp_path / "run")
    for silo in workers:
        silo.restart()
    again = ScriptedGrid(*workers)  # type: ignore[arg-type]
    server, logs = run_on(again, secure, tmp_path / "run")
    plain = load_server(RunDirectory(tmp_path / "plain").checkpoint).shared.vector
    assert np.abs(server.shared.vector - plain).max() < 1e-6
    assert [sorted(log["clients"]) for log in logs] == [list(SILOS)] * 2
    for silo in workers:
        identity = identity_key(identity_of(identity_file(Path(silo.silo.state)))).hex()
        assert len([text for text in silo.seen.told if "is new, its identity is" in text]) == 2
        for other in workers:
            told = [text for text in other.seen.told if text.startswith(f"silo {silo.name} is new")]
            assert len(told) == (other is not silo)
            assert all(" ".join(identity[at : at + 4] for at in range(0, 32, 4)) in text for text in told)


def test_a_silo_accepts_its_roster_only(config: RunConfig, tmp_path: Path, silos: Path, tiny_base: Path) -> None:
    secure = secured(config)
    workers = served(secure, tmp_path, silos, tiny_base)
    known = {s.name: identity_key(identity_of(identity_file(Path(s.silo.state)))).hex() for s in workers}
    workers[0].silo = workers[0].silo.model_copy(update={"roster": known | {"law_firm": "0" * 64}})
    workers[0].restart()
    grid = ScriptedGrid(*workers)  # type: ignore[arg-type]
    with pytest.raises(FederationError, match="2 silos are left in the round"):
        run_on(grid, secure, tmp_path / "run")
    workers[0].silo = workers[0].silo.model_copy(update={"roster": known})
    workers[0].restart()
    run_on(ScriptedGrid(*workers), secure, tmp_path / "run")  # type: ignore[arg-type]
    assert not [text for text in workers[0].seen.told if "is new" in text]


@pytest.mark.parametrize(
    ("privacy", "rule"),
    [
        ({"aggregation": "plain"}, r"privacy.aggregation must be 'secure' (policy.aggregation)"),
        ({}, "with secure aggregation, privacy.agreement must be true (policy.agreement)"),
    ],
)
def test_a_silo_can_require_it(
    config: RunConfig, tmp_path: Path, silos: Path, tiny_base: Path, privacy: dict[str, Any], rule: str
) -> None:
    asked = secured(config, **privacy)
    more = 'aggregation = "secure"\nagreement = true'
    silo = Served(silo_at(tmp_path / "clinic", silos, tiny_base, more), asked.to_toml())
    reply = silo.answer("query.join", records({"run": "0" * 32}))
    assert info_of(reply)["error"] == f"PolicyError: {rule}"


def test_the_comparison_of_single_updates_is_refused_before_the_run(config: RunConfig) -> None:
    apart = config.model_copy(update={"privacy": config.privacy.model_copy(update={"aggregation": "secure"})})
    with pytest.raises(ConfigError, match=r"federation.max_norm_ratio = 10 with privacy.aggregation = 'secure'"):
        at_silos(apart)
