"""The server's rounds with secure aggregation: drop-outs in each phase, resumed runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexperts.communication.secure.messages import Revealed
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.parameters.vector import Vector
from flexperts.server.masked_rounds import MaskedRounds

from .masking_silos import CLIP, MASKED, MaskingSilo, four
from .scripted_grid import START, ScriptedGrid, StopError, Watch, dead, drop, run_on

Recipe = Callable[..., RunConfig]
STEP = CLIP * 4 / 2**31
"""What the whole numbers of four silos are accurate to."""


def expected(rounds: Iterable[str], silos: list[MaskingSilo]) -> Vector:
    """Return the shared weights after rounds in which the named silos' updates are in the mean."""
    start = START.vector.astype(np.float64)
    for number, names in enumerate(rounds, 1):
        those = [silo for silo in silos if silo.name in names]
        rows = max(1, sum(silo.rows for silo in those))
        start = start + sum(silo.rows / rows * silo.change(number).astype(np.float64) for silo in those)
    return np.asarray(start, np.float32)


def kinds(grid: ScriptedGrid) -> str:
    """Return the exchanges of a run in their order, each by one letter."""
    letters = [kind.removeprefix("query.")[0] for kind, _ in grid.asked]
    return "".join(one for one, before in zip(letters, ["", *letters], strict=False) if one != before)


def test_the_mean_is_the_plain_one_and_the_server_has_no_update(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    grid = ScriptedGrid(*silos)
    server, logs = run_on(grid, recipe(*MASKED), tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd"] * 3, silos)).max() < 10 * STEP + 1e-6
    assert kinds(grid).startswith("ji")
    # Keys come once alone; in every round after that, one exchange more than without masks.
    assert kinds(grid)[2:].replace("i", "") == "k" + "tk" * 3 + "e"
    assert [log["secure"]["exchanges"] for log in logs] == [2, 1, 1]
    assert all(set(log["secure"]["uplink"]) == set("abcd") for log in logs)
    assert all(log["clients"].keys() == set("abcd") for log in logs)
    for log in logs:
        assert 0 < log["secure"]["norm"] <= CLIP


def test_keys_are_asked_of_the_clients_that_train(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of FDLoRA's clients train in round 1, and three of four in later ones, whose keys come a round before."""
    sessions: dict[int, list[str]] = {}
    make = MaskedRounds._session

    def spy(its: MaskedRounds, rows: dict[str, int], number: int, log: Any) -> Any:
        sessions[number] = sorted(rows)
        return make(its, rows, number, log)

    monkeypatch.setattr(MaskedRounds, "_session", spy)
    config = recipe(*MASKED, "method.name=fdlora", "federation.participation=0.75", "privacy.survivors=0.5")
    _, logs = run_on(ScriptedGrid(*four()), config, tmp_path / "run")
    assert sessions == {log["number"]: log["participants"] for log in logs}
    assert [len(log["participants"]) for log in logs] == [4, 3, 3]


@pytest.mark.parametrize("fault", ["drop", "dead", "spoilt"])
@pytest.mark.parametrize("silo", ["a", "c", "d"])
def test_a_silo_that_drops_out_while_it_trains_is_left_out(
    recipe: Recipe, tmp_path: Path, fault: str, silo: str
) -> None:
    silos = four()
    grid = ScriptedGrid(*silos)
    grid.faults["train", 2, silo] = {"drop": drop, "dead": dead, "spoilt": spoilt}[fault]
    server, logs = run_on(grid, recipe(*MASKED), tmp_path / "run")
    left = "abcd".replace(silo, "")
    assert np.abs(server.shared.vector - expected(["abcd", left, "abcd"], silos)).max() < 10 * STEP + 1e-6
    assert list(logs[1]["clients"]) == list(left)
    assert logs[2]["secure"]["exchanges"] == 1  # it is asked for keys of the next round like the others


def spoilt(request: Any, reply: Any) -> list[Any]:
    """Change the rows, which must be those of joining, in a masked reply."""
    reply.content["metrics"]["rows"] = 99
    return [reply]


@pytest.mark.parametrize("silo", ["a", "d"])
def test_a_silo_that_sends_no_keys_is_not_asked_to_train(recipe: Recipe, tmp_path: Path, silo: str) -> None:
    silos = four()
    grid = ScriptedGrid(*silos)
    grid.faults["query.keys", 0, silo] = drop
    server, logs = run_on(grid, recipe(*MASKED), tmp_path / "run")
    left = "abcd".replace(silo, "")
    assert np.abs(server.shared.vector - expected([left] * 3, silos)).max() < 10 * STEP + 1e-6
    assert ("train", silo) not in grid.asked
    assert set(logs[0]["refused"]) == {silo}
    assert "it has sent no keys and shares in time" in logs[0]["refused"][silo]
    assert logs[0]["missing"] == [silo]


def test_a_silo_that_drops_out_while_the_sum_is_unmasked_is_in_the_sum(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    grid = ScriptedGrid(*silos)

    def only_keys(request: Any, reply: Any) -> list[Any]:
        return [reply] if "unmask" not in request.content["info"] else []

    grid.faults["query.keys", 0, "b"] = only_keys
    server, logs = run_on(grid, recipe(*MASKED, "federation.rounds=1"), tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd"], silos)).max() < 10 * STEP + 1e-6
    assert logs[0]["refused"] == {"b": "it has sent no keys and shares in time"}


@pytest.mark.parametrize("phase", ["keys", "train", "unmask"])
def test_too_few_survivors_end_the_round_by_name_and_it_resumes(recipe: Recipe, tmp_path: Path, phase: str) -> None:
    silos, config = four(), recipe(*MASKED)
    grid = ScriptedGrid(*silos)

    def at(request: Any, reply: Any) -> list[Any]:
        return [] if ("unmask" in request.content["info"]) == (phase == "unmask") else [reply]

    for name in "bc":
        grid.faults[("train", 1, name) if phase == "train" else ("query.keys", 0, name)] = (
            drop if phase == "train" else at
        )
    with pytest.raises(FederationError, match="2 silos are left in the round: the sum of fewer than 3 is not made"):
        run_on(grid, config, tmp_path / "run")
    again = ScriptedGrid(*silos)
    server, logs = run_on(again, config, tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd"] * 3, silos)).max() < 10 * STEP + 1e-6
    assert [log["number"] for log in logs] == [1, 2, 3]


def test_a_silo_that_joins_between_rounds_gives_keys_in_an_exchange_of_its_own(
    recipe: Recipe, tmp_path: Path
) -> None:
    silos = four()
    grid = ScriptedGrid(*silos[:3])
    server, logs = run_on(
        grid,
        recipe(*MASKED),
        tmp_path / "run",
        Watch(round_1=lambda: grid.enter(silos[3]), round_2=lambda: grid.leave("a")),
    )
    assert np.abs(server.shared.vector - expected(["abc", "abcd", "bcd"], silos)).max() < 10 * STEP + 1e-6
    assert [log["secure"]["exchanges"] for log in logs] == [2, 2, 1]


@pytest.mark.parametrize("factor", [3, 12345])
def test_what_clipped_updates_cannot_sum_up_to_changes_nothing(recipe: Recipe, tmp_path: Path, factor: int) -> None:
    """The masks of one silo are then wrong, too, and the sum is any number. The run ends all the same."""
    silos = four()
    silos[1].factor = factor
    watch = Watch(round_2=lambda: setattr(silos[1], "factor", 1))
    server, logs = run_on(ScriptedGrid(*silos), recipe(*MASKED), tmp_path / "run", watch)
    start = expected(["", "", "abcd"], silos)
    assert np.abs(server.shared.vector - start).max() < 10 * STEP + 1e-6
    for log in logs[:2]:
        assert log["secure"]["spoilt"].startswith("the mean of the updates of a, b, c, d has an L2 norm of ")
        assert log["clients"] == log["uplink"] == {}
    assert sorted(logs[2]["clients"]) == list("abcd")


def test_an_update_without_masks_is_refused_by_the_silos_name(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    grid = ScriptedGrid(*silos)

    def bare(request: Any, reply: Any) -> list[Any]:
        reply.content["info"].pop("packing")
        return [reply]

    grid.faults["train", 1, "b"] = bare
    _, logs = run_on(grid, recipe(*MASKED), tmp_path / "run")
    assert logs[0]["refused"]["b"].startswith(
        "b sent an update that is not masked: the recipe has secure aggregation"
    )


def test_a_wrong_share_is_named_and_the_sum_is_right(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    reveal = silos[2].masker.reveal

    def wrong(asked: Any) -> Revealed:
        sent = reveal(asked)
        return sent.model_copy(update={"secrets": sent.secrets | {"d": f"{int(sent.secrets['d'], 16) ^ 1:064x}"}})

    silos[2].masker.reveal = wrong  # type: ignore[method-assign]
    server, logs = run_on(ScriptedGrid(*silos), recipe(*MASKED), tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd"] * 3, silos)).max() < 10 * STEP + 1e-6
    assert logs[0]["refused"] == {"c": "it has sent a wrong share of d, or got one from it"}


def test_wrong_shares_without_others_in_their_place_change_nothing(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    reveal = silos[2].masker.reveal

    def wrong(asked: Any) -> Revealed:
        sent = reveal(asked)
        return sent.model_copy(
            update={"keys": {name: f"{int(key, 16) ^ 1:064x}" for name, key in sent.keys.items()}}
        )

    silos[2].masker.reveal = wrong  # type: ignore[method-assign]
    grid = ScriptedGrid(*silos)
    grid.faults["train", 2, "d"] = drop
    server, logs = run_on(grid, recipe(*MASKED), tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd", "", "abcd"], silos)).max() < 10 * STEP + 1e-6
    assert "the shares of d: they do not give its secret" in logs[1]["secure"]["spoilt"]


def test_a_silo_with_most_rows_counts_for_its_share_only(recipe: Recipe, tmp_path: Path) -> None:
    silos = four()
    silos[0].rows = 1000
    server, logs = run_on(ScriptedGrid(*silos), recipe(*MASKED), tmp_path / "run")
    assert logs[0]["capped"] == {"a": 16}
    silos[0].rows = 16
    assert np.abs(server.shared.vector - expected(["abcd"] * 3, silos)).max() < 10 * STEP + 1e-6


def stopped(silos: Sequence[Any], config: RunConfig, out: Path) -> None:
    """Run rounds up to the scores of the last one, after its sum is unmasked."""
    grid = ScriptedGrid(*silos)

    def stop(request: Any, reply: Any) -> list[Any]:
        raise StopError

    grid.faults["evaluate", 3, "a"] = stop
    with pytest.raises(StopError):
        run_on(grid, config, out)


@pytest.mark.parametrize("gone", ["", "d"])
def test_a_run_that_is_stopped_after_unmasking_resumes_with_the_same_sum(
    recipe: Recipe, tmp_path: Path, gone: str
) -> None:
    """Other survivors' sum would differ by single updates, so the silos give no shares for it."""
    silos, config = four(), recipe(*MASKED)
    stopped(silos, config, tmp_path / "run")
    again = ScriptedGrid(*(silo for silo in silos if silo.name != gone))
    server, logs = run_on(again, config, tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd"] * 3, silos)).max() < 10 * STEP + 1e-6
    assert "train" not in [kind for kind, _ in again.asked]
    assert sorted(logs[2]["clients"]) == list("abcd")
    assert not (tmp_path / "run" / "masked-sum.safetensors").exists()


def test_without_the_sum_that_was_kept_a_summed_round_is_not_repeated(recipe: Recipe, tmp_path: Path) -> None:
    silos, config = four(), recipe(*MASKED)
    stopped(silos, config, tmp_path / "run")
    (tmp_path / "run" / "masked-sum.safetensors").unlink()
    with pytest.raises(
        FederationError, match="keys for another sum of round 3: this silo has given its shares for one"
    ):
        run_on(ScriptedGrid(*silos), config, tmp_path / "run")


def test_silos_that_agree_on_the_survivors_take_one_exchange_more(recipe: Recipe, tmp_path: Path) -> None:
    silos = four(agrees=True)
    grid = ScriptedGrid(*silos)
    grid.faults["train", 2, "b"] = drop
    server, logs = run_on(grid, recipe(*MASKED, "privacy.agreement=true"), tmp_path / "run")
    assert np.abs(server.shared.vector - expected(["abcd", "acd", "abcd"], silos)).max() < 10 * STEP + 1e-6
    assert [log["secure"]["exchanges"] for log in logs] == [3, 2, 2]


def test_silos_that_agree_give_nothing_to_a_server_that_does_not_ask(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="0 signatures of the survivors: 3 must have signed one list"):
        run_on(ScriptedGrid(*four(agrees=True)), recipe(*MASKED), tmp_path / "run")


def test_a_round_names_its_own_capped_silos(recipe: Recipe, tmp_path: Path) -> None:
    """The rows of the next round are counted in it, to ask for that round's keys."""
    config = recipe(*MASKED, "federation.rounds=6", "federation.participation=0.5")
    silos = [MaskingSilo("a", 100), *(MaskingSilo(name, 1) for name in "bcdef")]
    _, logs = run_on(ScriptedGrid(*silos), config, tmp_path / "run")
    assert [list(log["capped"]) for log in logs] == [["a"] if "a" in log["participants"] else [] for log in logs]
    assert 0 < sum(bool(log["capped"]) for log in logs) < 6
