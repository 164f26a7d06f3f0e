"""One silo does not own the mean: not by the rows it claims, and not by the size of its update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.federation.scripted_grid import FOUR, START, ScriptedGrid, Silo, Watch, bits, drop, run_on

from flexperts.artifacts import RunDirectory
from flexperts.communication.average import capped, weighted_mean
from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.methods.hetlora import HetLoRA
from flexperts.methods.hfedmoe_style import HFedMoEStyle
from flexperts.methods.kit.server_state import Server
from flexperts.methods.scaffold import Scaffold
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload, Vector
from flexperts.server.admission import Admission

Recipe = Callable[..., RunConfig]


@dataclass
class Calm(Silo):
    """A silo whose updates are as small as real ones; an attacker's are some times larger."""

    times: float = 1.0

    def change(self, number: int) -> Vector:
        return (super().change(number) * np.float32(0.01 * self.times)).astype(np.float32)


def three() -> list[Silo]:
    return [Calm(name, 10) for name in "abc"]


class Notices(Observer):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


# Claimed rows.


@pytest.mark.parametrize(
    ("rows", "share", "counted"),
    [
        ([10, 10, 10, 10**6], 0.5, [10, 10, 10, 30]),
        ([10, 10, 10, 10**6], 0.25, [10] * 4),
        ([10, 10, 10, 10**6], 0.01, [10] * 4),
        ([10, 10, 10, 10**6], 1, [10, 10, 10, 10**6]),
        ([10, 10, 100, 10**6], 0.3, [10, 10, 15, 15]),
        ([3, 5, 7], 0.5, [3, 5, 7]),
        ([8, 8, 8], 0.1, [8, 8, 8]),
        ([1, 10**6], 0.5, [1, 10**6]),
        ([0.0, 0.0, 0.0], 0.5, [0.0, 0.0, 0.0]),
        ([], 0.5, []),
        ([5, 5, 1], 0.3, [1, 1, 1]),
        ([1, 2, 3, 4, 5, 6], 0.1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rows_are_capped(rows: list[int], share: float, counted: list[int]) -> None:
    assert capped(rows, share) == counted


@given(st.lists(st.integers(1, 10**9), min_size=3, max_size=12), st.floats(0.01, 1))
def test_no_share_is_larger_than_the_cap(rows: list[int], share: float) -> None:
    found = capped([float(n) for n in rows], share)
    assert max(found) <= max(share, 1 / len(rows)) * sum(found) * (1 + 1e-9)
    assert all(0 < after <= before for after, before in zip(found, rows, strict=True))
    if max(rows) <= share * sum(rows):
        assert found == rows
    assert capped(found, share) == pytest.approx(found)


@given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from((0.01, 1 / 3, 0.5, 1.0)),
)
@example([2.3796462709189137, 5.442292252959518], 1, 0.5)
def test_weights_that_are_no_whole_numbers_are_capped_too(weights: list[float], zeros: int, share: float) -> None:
    """Such as norms, of which some may be 0; sums of them are rounded."""
    given_weights = weights + [0.0] * zeros
    found = capped(given_weights, share)
    assert all(0 <= after <= before for after, before in zip(found, given_weights, strict=True))
    if len(found) > 2:
        assert max(found) <= max(share, 1 / len(found)) * sum(found) * (1 + 1e-9)


@pytest.mark.parametrize("method", ["fedavg", "fedavgm", "flexlora"])
@pytest.mark.parametrize("claimed", [10**6, 2**31])
def test_a_silo_that_claims_many_rows_has_half_of_the_mean(
    recipe: Recipe, tmp_path: Path, method: str, claimed: int
) -> None:
    """It ends as a run in which it has as many rows as the three others together."""
    config = recipe(*FOUR, f"method.name={method}")
    claims, _ = run_on(ScriptedGrid(Calm("0", 30), *three()), config, tmp_path / "modest")
    watch = Notices()
    server, rounds = run_on(ScriptedGrid(Calm("0", claimed), *three()), config, tmp_path / "run", watch)
    assert bits(server) == bits(claims)
    assert all(torch.equal(server.memory[name], tensor) for name, tensor in claims.memory.items())
    assert [each["capped"] for each in rounds] == [{"0": 30}] * 4
    said = [text for text in watch.notices if text.startswith(f"0 reports {claimed} rows and counts for 30: ")]
    assert len(said) == 1
    assert "federation.max_share = 0.5" in said[0]


def test_when_others_do_not_answer_its_share_stays(recipe: Recipe, tmp_path: Path) -> None:
    """Of four silos one is silent: two of ten rows weigh as much as the claim."""
    grid = ScriptedGrid(Calm("0", 10**6), *three())
    grid.faults["train", 1, "a"] = drop
    _, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert [each["capped"] for each in rounds] == [{"0": 20}, *[{"0": 30}] * 3]


def test_honest_federations_are_averaged_as_before(recipe: Recipe, tmp_path: Path) -> None:
    silos = [Calm("a", 3), Calm("b", 5), Calm("c", 7)]
    server, rounds = run_on(ScriptedGrid(*silos), recipe(*FOUR), tmp_path / "run")
    free, _ = run_on(ScriptedGrid(*silos), recipe(*FOUR, "federation.max_share=1"), tmp_path / "free")
    assert bits(server) == bits(free)
    assert [each["capped"] for each in rounds] == [{}] * 4
    pair, _ = run_on(ScriptedGrid(Calm("a", 3), Calm("b", 500)), recipe(*FOUR), tmp_path / "pair")
    start = START.vector
    for number in range(1, 5):
        sent = [(n, rows, start + Calm(n, rows).change(number)) for n, rows in (("a", 3), ("b", 500))]
        start = weighted_mean(Update(n, Payload(START.manifest, vector), rows, {}) for n, rows, vector in sent)
    assert bits(pair) == start.tobytes()


def test_scaffolds_share_of_all_rows_is_of_counted_rows() -> None:
    """The claim of a silo that does not take part leaves the control variates as fast as before."""
    method, start = Scaffold(), Payload.of({"x": torch.zeros(1)})
    server = Server(start, {"0": 10**6, "a": 10, "b": 10, "c": 10}, max_share=0.5)
    method.start(server)
    sent = Payload.of({"x": torch.zeros(1), "derived.control.x": torch.ones(1)})
    method.aggregate(server, [Update(name, sent, 10, {}) for name in "abc"])
    assert server.memory["x"].item() == 0.5


def test_hetloras_norms_are_claims_too() -> None:
    """The norm of a client's product is its weight; a huge one is half of the mean."""

    def sent(scale: float) -> Payload:
        A, B = torch.full((1, 2), scale), torch.full((2, 1), scale)
        return Payload.of({"l.lora_A.weight": A, "l.lora_B.weight": B, "derived.rank": torch.ones(1)})

    shared = Payload.of({n: t for n, t in sent(1).tensors().items() if "lora" in n})
    server = Server(shared, dict.fromkeys("0abc", 10), max_share=0.5)
    HetLoRA().aggregate(server, [Update(n, sent(1000 if n == "0" else 1), 10, {}) for n in "0abc"])
    assert server.shared.tensors()["l.lora_A.weight"][0, 0] == pytest.approx(0.5 * 1000 + 0.5)


def test_a_routers_worth_is_a_claim_too() -> None:
    def sent(router: float, usage: float) -> Payload:
        numbers = {f"derived.{what}.l": torch.full((2,), usage) for what in ("usage", "score", "learned")}
        return Payload.of({"router.layers.l": torch.full((2, 3), router), **numbers})

    shared = Payload.of({"router.layers.l": torch.zeros(2, 3)})
    server = Server(shared, dict.fromkeys("0abc", 10), max_share=0.5)
    updates = [Update(n, sent(9, 1e6) if n == "0" else sent(1, 0.5), 10, {}) for n in "0abc"]
    HFedMoEStyle().aggregate(server, updates)
    assert server.shared.tensors()["router.layers.l"].unique().item() == pytest.approx(0.5 * 9 + 0.5)


# The size of an update.


@pytest.mark.parametrize("times", [30, 700])
@pytest.mark.parametrize("rows", [10, 10**6])
def test_an_update_beyond_the_rounds_median_is_refused(
    recipe: Recipe, tmp_path: Path, times: float, rows: int
) -> None:
    """Though 700 usual ones are below the absolute limit."""
    config = recipe(*FOUR)
    honest, _ = run_on(ScriptedGrid(*three()), config, tmp_path / "honest")
    grid, watch = ScriptedGrid(Calm("0", rows, times=times), *three()), Watch()
    server, rounds = run_on(grid, config, tmp_path / "run", watch)
    assert bits(server) == bits(honest)
    for each in rounds:
        assert [*each["clients"]] == [*each["uplink"]] == ["a", "b", "c"]
        assert [*each["refused"]] == ["0"]
        assert "times the round's median" in each["refused"]["0"]
        assert "federation.max_norm_ratio = 10" in each["refused"]["0"]
    assert len(watch.refusals) == 4
    assert sorted(RunDirectory(tmp_path / "run").summary()["clients"]) == ["0", "a", "b", "c"]  # it is scored


def test_the_rule_can_be_set_and_switched_off(recipe: Recipe, tmp_path: Path) -> None:
    for setting, refused in (("100", []), ("2", ["0"]), ('"off"', [])):
        grid = ScriptedGrid(Calm("0", 10, times=30), *three())
        config = recipe(*FOUR, f"federation.max_norm_ratio={setting}")
        _, rounds = run_on(grid, config, tmp_path / setting.strip('"'))
        assert [[*each["refused"]] for each in rounds] == [refused] * 4


def test_of_two_updates_neither_is_too_large(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(Calm("0", 10, times=90), Calm("a", 10))
    _, rounds = run_on(grid, recipe(*FOUR), tmp_path / "run")
    assert [[*each["refused"]] for each in rounds] == [[]] * 4


def test_where_nobody_changes_anything_nobody_is_too_large(recipe: Recipe, tmp_path: Path) -> None:
    silos = [Calm(name, 10, times=0) for name in "abc"]
    _, rounds = run_on(ScriptedGrid(Calm("0", 10), *silos), recipe(*FOUR), tmp_path / "run")
    assert [[*each["refused"]] for each in rounds] == [[]] * 4


def test_a_quorum_counts_usable_updates_only(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, "federation.quorum=1")
    with pytest.raises(FederationError, match=r"round 1: 3 of 4 .*0 refused .*the round's median"):
        run_on(ScriptedGrid(Calm("0", 10, times=700), *three()), config, tmp_path / "run")


@pytest.mark.parametrize("name", ["x", "derived.control.x"])
def test_values_of_each_kind_are_judged_alone(recipe: Recipe, name: str) -> None:
    """A huge change of weights is not hidden by control variates that are larger, nor the other way."""
    method: Any = Scaffold()
    server = Server(Payload.of({"x": torch.full((4,), 5.0)}), dict.fromkeys("0abc", 10))
    method.start(server)
    judge = Admission(method, recipe(), server)
    usual = {"x": torch.full((4,), 5.01), "derived.control.x": torch.full((4,), 1.0)}
    far = usual | {name: usual[name] + (1.0 if name == "x" else 20.0)}
    sizes = {n: judge.sizes(Update(n, Payload.of(far if n == "0" else usual), 10, {})) for n in "0abc"}
    assert [*judge.too_large(sizes)] == ["0"]
    del sizes["0"]
    assert judge.too_large(sizes) == {}


def test_parameters_are_measured_from_what_their_client_was_sent(recipe: Recipe) -> None:
    """Clients of different ranks receive parts of different sizes."""
    method = HetLoRA(HetLoRA.Options(ranks={"a": 1}))
    tensors = {"l.lora_A.weight": torch.full((2, 3), 7.0), "l.lora_B.weight": torch.zeros(3, 2)}
    server = Server(Payload.of(tensors), dict.fromkeys("abc", 10))
    judge = Admission(method, recipe(), server)

    def sent(client: str, change: float) -> Update:
        payload = method.broadcast(server, client)
        return Update(client, replace(payload, vector=payload.vector + np.float32(change)), 10, {})

    sizes = {client: judge.sizes(sent(client, 1.0 if client == "a" else 0.01)) for client in "abc"}
    assert sizes["a"] == {"parameters": pytest.approx(1.0)}
    assert sizes["b"] == {"parameters": pytest.approx(0.01, rel=1e-3)}
    assert [*judge.too_large(sizes)] == ["a"]


def test_an_update_below_ten_times_the_median_is_taken(recipe: Recipe) -> None:
    judge = Admission(SimpleNamespace(additive=True), recipe(), Server(START, {}))  # type: ignore[arg-type]
    assert judge.too_large({n: {"parameters": size} for n, size in zip("abcd", (1, 2, 4, 9), strict=True)}) == {}
