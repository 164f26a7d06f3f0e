"""One silo cannot set the others' start: initial weights, tensors, split, adapter configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from tests.federation.scripted_grid import (
    FOUR,
    LORA,
    SHARING,
    START,
    ScriptedGrid,
    Silo,
    Watch,
    bits,
    drop,
    losses,
    run_on,
    stopped,
    trio,
)

from flexperts.communication.messages import info_of, records
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.parameters.vector import Payload

Recipe = Callable[..., RunConfig]


@dataclass
class Liar(Silo):
    """A silo that is first by name and by node, with a start of its own."""

    name: str = "0"
    rows: int = 4
    payload: Payload = START
    split: str = "[]"
    digest: Any = None
    """The digest that it reports; by default the right one of its own start."""
    more: dict[str, str] = field(default_factory=dict)

    def _initial(self, kind: str, content: RecordDict) -> RecordDict:
        digest = self.payload.digest(self.split) if self.digest is None else self.digest
        told = {"client": self.name, "split": self.split, "digest": digest, **self.more}
        return records(told, {}, self.payload if info_of(content)["weights"] else None)


def filled(value: float) -> Payload:
    return replace(START, vector=np.full_like(START.vector, value))


SPLIT = json.dumps([{"group": "shared", "parameters": 1}])
STARTS: dict[str, Liar] = {
    "huge": Liar(payload=filled(1e30)),
    "not finite": Liar(payload=filled(float("nan"))),
    "other values": Liar(payload=replace(START, vector=START.vector + np.float32(1e-3))),
    "other names": Liar(payload=Payload.of({"x": torch.zeros(2, 3)})),
    "one more tensor": Liar(payload=Payload.of(START.tensors() | {f"{LORA}.more": torch.zeros(1)})),
    "another rank": Liar(
        payload=Payload.of({f"{LORA}.lora_A.weight": torch.ones(9, 3), f"{LORA}.lora_B.weight": torch.ones(3, 9)})
    ),
    "no weights": Liar(payload=Payload.empty()),
    "no split": Liar(split="null"),
    "another split": Liar(split=SPLIT),
    "a split that is no JSON": Liar(split="["),
    "a split that is nested": Liar(split="[" * 10_000),
    "weights that are not the digest's": Liar(payload=filled(1e30), digest=START.digest("[]")),
    "a split that is not the digest's": Liar(split=SPLIT, digest=START.digest("[]")),
    "no digest": Liar(digest=0),
    "a digest of another length": Liar(digest="00"),
    "the digest of nothing": Liar(digest="0" * 64),
    "an adapter configuration": Liar(more={"adapter": '{"r": 1, "auto_map": "x"}'}),
}


@pytest.mark.parametrize("kind", STARTS)
def test_who_has_another_start_is_turned_away(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    honest, attacked, config = tmp_path / "honest", tmp_path / "attacked", recipe(*FOUR)
    run_on(ScriptedGrid(*trio()), config, honest)
    _, rounds = run_on(ScriptedGrid(STARTS[kind], *trio()), config, attacked)
    assert [*rounds[0]["refused"]] == ["0"]
    assert "initial weights" in rounds[0]["refused"]["0"]
    assert [[*each["clients"]] for each in rounds] == [["a", "b", "c"]] * 4
    for name in ("checkpoint.safetensors", "shared/adapter_model.safetensors", "shared/adapter_config.json"):
        assert (honest / name).read_bytes() == (attacked / name).read_bytes()


def test_the_adapters_configuration_is_the_recipes(recipe: Recipe, tmp_path: Path) -> None:
    """Even where the attacker is alone. The folder has the rank of the tensors, at the recipe's scaling."""
    run_on(ScriptedGrid(Liar()), recipe(*FOUR, "lora.rank=8", "lora.alpha=32"), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "shared" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["target_modules"]) == (2, 8.0, ["layers.0.q_proj"])
    assert "auto_map" not in told


def test_a_report_of_who_is_turned_away_decides_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """With the liar's losses the common expert would be 0."""
    a, b = Silo("a", 3, report=losses(3, 1)), Silo("b", 5, report=losses(2, 1))
    c = Silo("c", 7, report=losses(3, 2))
    server, _ = run_on(ScriptedGrid(a, b, c), recipe(*SHARING), tmp_path / "honest")
    liar = Liar(payload=filled(1e30), report=losses(0, 99))
    attacked, _ = run_on(ScriptedGrid(liar, a, b, c), recipe(*SHARING), tmp_path / "attacked")
    assert attacked.agreement == server.agreement == {"layer": [1, 0]}
    assert bits(attacked) == bits(server)


def test_as_many_liars_as_others_stop_the_run_by_name(recipe: Recipe, tmp_path: Path) -> None:
    a, b, _ = trio()
    liars = [replace(STARTS["huge"], name=name) for name in ("0", "1")]
    with pytest.raises(FederationError, match=r"0 has .*, 1 has .*, a has .*, b has .*: more than half"):
        run_on(ScriptedGrid(*liars, a, b), recipe(*FOUR), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_the_silence_of_others_does_not_make_one_silo_the_majority(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(STARTS["huge"], *trio())
    grid.faults |= {("query.initial", 0, name): drop for name in "abc"}
    with pytest.raises(FederationError, match="initial weights and split of 4 silos: 0 has"):
        run_on(grid, recipe(*FOUR), tmp_path / "run")


@pytest.mark.parametrize("kind", ["huge", "another split", "weights that are not the digest's"])
def test_nor_when_a_run_is_resumed(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    """Two liars and one honest silo are there first: the run has its start already."""
    config, a = recipe(*FOUR, "federation.quorum=0.1"), trio()[0]
    liars = [replace(STARTS[kind], name=name) for name in ("0", "1")]
    for name, silos in (("honest", [a]), ("attacked", [*liars, a])):
        stopped(config, tmp_path / name, *trio())
        run_on(ScriptedGrid(*silos), config, tmp_path / name)
    one, other = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("honest", "attacked"))
    assert one == other


@pytest.mark.parametrize("kind", ["huge", "no split", "no digest"])
def test_who_comes_later_is_asked_too(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    grid, config = ScriptedGrid(*trio()), recipe(*FOUR)
    watch = Watch(round_1=lambda: grid.enter(STARTS[kind]))
    server, rounds = run_on(grid, config, tmp_path / "attacked", watch)
    assert "initial weights" in rounds[1]["refused"]["0"]
    assert bits(server) == bits(run_on(ScriptedGrid(*trio()), config, tmp_path / "honest")[0])


def test_a_slow_silo_is_not_turned_away(recipe: Recipe, tmp_path: Path) -> None:
    def slow(request: Message, reply: Message) -> list[Message]:
        return []

    grid = ScriptedGrid(*trio())
    grid.faults["query.initial", 0, "a"] = slow
    server, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert [*rounds[0]["clients"]] == ["a", "b", "c"]
    assert bits(server) == bits(run_on(ScriptedGrid(*trio()), recipe(*FOUR), tmp_path / "other")[0])
