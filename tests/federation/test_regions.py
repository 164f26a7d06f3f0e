"""Two tiers: regions of scripted silos under a root, against one tier of the same silos."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from flexperts.artifacts import RunDirectory
from flexperts.communication.messages import metrics_of, records
from flexperts.communication.schema import MOST_ROWS
from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError, FederationError
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.server.checkpoint import load_server
from flexperts.server.forget_client import forget_client
from flexperts.server.region import _SAME, Region, check_region, check_same
from flexperts.terminal.display import RunDisplay

from .masking_silos import CLIP, MaskingSilo
from .scripted_grid import (
    FOUR,
    START,
    ScriptedGrid,
    Silo,
    StopError,
    Watch,
    changed,
    drop,
    expected,
    run_on,
    stopped,
)

Recipe = Callable[..., RunConfig]
OPEN = ("federation.max_share=1", "federation.max_norm_ratio=off")


class Tier:
    """A region as a node of the root's grid."""

    def __init__(self, name: str, config: RunConfig, folder: Path, *silos: Any) -> None:
        self.name, self.grid = name, ScriptedGrid(*silos)
        self.config, self.folder = config, folder / name
        self.open()

    def open(self) -> None:
        """Start, or start again from what is on disk."""
        run = RunDirectory.create_or_resume(self.folder, self.config.to_toml())
        self.region = Region(self.name, self.grid, self.config, run, Observer())

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        reply = self.region.answer(kind, content)
        self.region.settle()
        return reply


def five() -> list[Silo]:
    return [Silo(name, 3 + i) for i, name in enumerate("abcde")]


def two_tiers(config: RunConfig, folder: Path, silos: list[Silo]) -> tuple[Tier, Tier]:
    return Tier("north", config, folder, *silos[:2]), Tier("south", config, folder, *silos[2:])


def train(number: int, payload: Payload = START) -> RecordDict:
    """The root's request."""
    return records({"run": "r", "round": number, "agreement": "null"}, payload=payload)


def evaluate(number: int, payload: Payload = START) -> RecordDict:
    """The root's request."""
    states = {"states": ["zero_shot", "global"], "answers": True}
    return records({"run": "r", "round": number, "agreement": "null", **states}, payload=payload)


def numbers(tier: Tier) -> list[int]:
    """The rounds on disk, which a region that starts again must be able to read."""
    tier.open()
    return [log["number"] for log in tier.region.run.rounds()]


@pytest.mark.parametrize("method", ["fedavg", "fedadam"])
def test_two_tiers_are_one(recipe: Recipe, tmp_path: Path, method: str) -> None:
    config = recipe(*FOUR, *OPEN, f"method.name={method}", "evaluation.every=2")
    one, flat = run_on(ScriptedGrid(*five()), config, tmp_path / "one")
    regions = two_tiers(config, tmp_path, five())
    two, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    np.testing.assert_allclose(two.shared.vector, one.shared.vector, rtol=2e-6, atol=2e-6)
    assert two.clients == {"north": 3 + 4, "south": 5 + 6 + 7}
    assert [sorted(log["clients"]) for log in logs] == [["north", "south"]] * 4
    for tier in regions:
        inside = tier.region.run.rounds()
        assert [log["number"] for log in inside] == [1, 2, 3, 4]
        assert [bool(log["scores"]) for log in inside] == [False, True, False, True]
        assert tier.region.finished
        summary = tier.region.run.summary()
        assert sorted(summary["clients"]) == sorted(tier.region.server.clients)
        RunDisplay().result(summary, tier.folder)
        assert list(summary["seconds"]) == ["setup", "training", "evaluation", "total"]
        spent = [log["seconds"] for log in inside if not log["scores"]]
        assert all(0 < its["evaluation"] < its["training"] for its in spent)
    means = [log["scores"]["south"]["nll.global"] for log in logs if log["scores"]]
    assert means == [6.0, 6.0]  # each scripted silo scores its number of rows: 5, 6 and 7
    assert [log["scores"]["south"]["rows"] for log in logs if log["scores"]] == [6, 6]
    assert flat[-1]["scores"]["c"]["nll.global"] == 5.0


def test_a_silo_that_is_missing_is_missing_in_the_mean(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN, "federation.rounds=1", "federation.quorum=0.3")
    silos = five()
    regions = two_tiers(config, tmp_path, silos)
    regions[1].grid.faults["train", 1, "d"] = drop
    server, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    whole = expected([[silo for silo in silos if silo.name != "d"]])
    np.testing.assert_allclose(server.shared.vector, whole, rtol=2e-6, atol=2e-6)
    assert logs[0]["clients"]["south"]["rows"] == 5 + 7


def test_a_region_that_fails_is_a_client_that_fails(recipe: Recipe, tmp_path: Path) -> None:
    """Round 2 has no quorum in the south; in rounds 1 and 3 it takes part."""
    config = recipe(*FOUR, *OPEN, "federation.rounds=3")
    silos = five()
    regions = two_tiers(config, tmp_path, silos)
    for name in "cde":
        regions[1].grid.faults["train", 2, name] = drop

    class Careful(Tier):
        def answer(self, kind: str, content: RecordDict) -> RecordDict:
            try:
                return super().answer(kind, content)
            except FederationError as error:
                return records({"client": self.name, "error": str(error)[:80]})

    regions[1].__class__ = Careful
    server, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    whole = expected([silos, silos[:2], silos])
    np.testing.assert_allclose(server.shared.vector, whole, rtol=2e-6, atol=2e-6)
    assert list(logs[1]["refused"]) == ["south"]


def test_a_region_that_was_stopped_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN)
    one, _ = run_on(ScriptedGrid(*five()), config, tmp_path / "one")
    regions = two_tiers(config, tmp_path, five())
    reopen = Watch(**{f"round_{number}": regions[1].open for number in (1, 2, 3)})
    two, _ = run_on(ScriptedGrid(*regions), config, tmp_path / "root", reopen)  # type: ignore[arg-type]
    np.testing.assert_allclose(two.shared.vector, one.shared.vector, rtol=2e-6, atol=2e-6)
    assert [log["number"] for log in regions[1].region.run.rounds()] == [1, 2, 3, 4]
    assert [sorted(log["clients"]) for log in regions[1].region.run.rounds()] == [["c", "d", "e"]] * 4


def test_a_region_that_was_stopped_before_an_evaluation_keeps_the_training(recipe: Recipe, tmp_path: Path) -> None:
    tier = Tier("north", recipe(*FOUR, *OPEN, "evaluation.every=1"), tmp_path, *five()[:2])
    tier.answer("train", train(1))
    tier.open()
    tier.answer("evaluate", evaluate(1))
    log, *rest = tier.region.run.rounds()
    assert sorted(log["clients"]) == sorted(log["scores"]) == ["a", "b"]
    assert not rest


def test_a_region_that_is_not_drawn_has_empty_rounds(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN, "federation.participation=0.5", "federation.rounds=4", "evaluation.every=1")
    regions = two_tiers(config, tmp_path, five())
    _, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    for tier in regions:
        inside = tier.region.run.rounds()
        assert [log["number"] for log in inside] == [1, 2, 3, 4]
        trained = [bool(log["clients"]) for log in inside]
        assert trained == [tier.name in log["clients"] for log in logs]


def test_secure_aggregation_inside_a_region(recipe: Recipe, tmp_path: Path) -> None:
    """The root's recipe is plain; what a region's server adds up is masked."""
    plain = recipe(*FOUR, *OPEN, "federation.rounds=2")
    secure = recipe(*FOUR, *OPEN, "federation.rounds=2", "privacy.aggregation=secure", f"privacy.clip={CLIP}")
    inner = [MaskingSilo(name, 3 + i) for i, name in enumerate("abc")]
    outer = [Silo("d", 6), Silo("e", 7)]
    regions = (Tier("north", secure, tmp_path, *inner), Tier("south", plain, tmp_path, *outer))
    server, logs = run_on(ScriptedGrid(*regions), plain, tmp_path / "root")  # type: ignore[arg-type]
    whole = expected([[*inner, *outer], [*inner, *outer]])
    np.testing.assert_allclose(server.shared.vector, whole, atol=2e-3)
    assert logs[1]["clients"]["north"]["rows"] == 3 + 4 + 5


@pytest.mark.parametrize("privacy", [(), ("privacy.aggregation=secure", f"privacy.clip={CLIP}")])
def test_the_rows_of_a_capped_silo_go_to_no_other(recipe: Recipe, tmp_path: Path, privacy: tuple[str, ...]) -> None:
    """a has 100 of the north's 105 rows, and counts for half of its mean: as many as the other five have."""
    plain = recipe(*FOUR, "federation.max_norm_ratio=off", "federation.rounds=2")
    inside = recipe(
        *FOUR, "federation.max_norm_ratio=off", "federation.rounds=2", "federation.quorum=0.5", *privacy
    )
    kind = MaskingSilo if privacy else Silo
    north = Tier("north", inside, tmp_path, kind("a", 100), *(kind(name, 1) for name in "bcdef"))
    south = Tier("south", plain, tmp_path, Silo("g", 60), Silo("h", 60))
    _, logs = run_on(ScriptedGrid(north, south), plain, tmp_path / "root")  # type: ignore[arg-type]
    assert north.region.run.rounds()[0]["capped"] == {"a": 5}
    assert [log["clients"]["north"]["rows"] for log in logs] == [10, 10]


def test_one_silo_does_not_lock_its_region_out(recipe: Recipe, tmp_path: Path) -> None:
    """It claims as many rows as a silo may, and the region has some more."""
    config = recipe(*FOUR, *OPEN, "federation.rounds=1")
    regions = two_tiers(config, tmp_path, [Silo("a", 3), Silo("b", MOST_ROWS), *five()[2:]])
    server, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    assert server.clients == {"north": MOST_ROWS, "south": 18}
    assert not logs[0]["refused"]


def test_a_silo_that_joins_later_costs_its_region_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """Nor when the region starts again; a root that is resumed asks it again, and knows of the silo."""
    settings = ("evaluation.rows=2", "evaluation.every=1", "federation.rounds=4", "federation.max_norm_ratio=off")
    config = recipe(*FOUR, *OPEN, *settings)
    regions = two_tiers(config, tmp_path, five())
    north = regions[0]

    def stop() -> None:
        raise StopError

    watch = Watch(round_1=lambda: north.grid.enter(Silo("f", 9)), round_2=north.open, round_3=stop)
    with pytest.raises(StopError):
        run_on(ScriptedGrid(*regions), config, tmp_path / "root", watch)  # type: ignore[arg-type]
    server, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    assert [log["unscored"] | log["refused"] for log in logs] == [{}] * 4
    assert [log["clients"]["north"]["rows"] for log in logs] == [7, 7, 7, 16]
    assert [log["scores"]["north"]["rows"] for log in logs] == [4, 4, 4, 6]
    assert server.silos["north"] == 3


def test_a_region_may_begin_with_one_silo(recipe: Recipe, tmp_path: Path) -> None:
    """Its rounds without that silo have other rows, as those of any region."""
    config = recipe(*FOUR, *OPEN, "federation.max_norm_ratio=off", "federation.rounds=3", "federation.quorum=0.3")
    north = Tier("north", config, tmp_path, Silo("a", 9))
    south = Tier("south", config, tmp_path, Silo("c", 5), Silo("d", 6))
    north.grid.faults["train", 2, "a"] = drop
    watch = Watch(round_1=lambda: north.grid.enter(Silo("b", 4)))
    server, logs = run_on(ScriptedGrid(north, south), config, tmp_path / "root", watch)  # type: ignore[arg-type]
    assert [log["refused"] for log in logs] == [{}] * 3
    assert [log["clients"]["north"]["rows"] for log in logs] == [9, 4, 9]
    assert server.silos == {"north": 1, "south": 2}


def test_regions_of_regions(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN, "evaluation.rows=2", "federation.rounds=2")
    one, _ = run_on(ScriptedGrid(*five()), config, tmp_path / "one")
    silos = five()
    low = Tier("n1", config, tmp_path, *silos[:2]), Tier("n2", config, tmp_path, silos[2])
    regions = Tier("north", config, tmp_path, *low), Tier("south", config, tmp_path, *silos[3:])
    two, logs = run_on(ScriptedGrid(*regions), config, tmp_path / "root")  # type: ignore[arg-type]
    np.testing.assert_allclose(two.shared.vector, one.shared.vector, rtol=2e-6, atol=2e-6)
    assert two.silos == {"north": 3, "south": 2}
    assert low[1].region.server.silos == {}
    assert not logs[-1]["unscored"]
    assert logs[-1]["scores"]["north"]["rows"] == 6


def test_a_region_that_is_forgotten_may_come_back_as_a_silo(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN)
    stopped(config, tmp_path / "root", *two_tiers(config, tmp_path, five()))  # type: ignore[arg-type]
    forget_client(run := RunDirectory.open(tmp_path / "root"), "south")
    assert load_server(run.checkpoint).silos == {"north": 2}


def test_an_update_with_more_rows_than_the_region_has_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN, "federation.rounds=1")
    grid = ScriptedGrid(*two_tiers(config, tmp_path, five()))  # type: ignore[arg-type]
    grid.faults["train", 1, "south"] = changed(metrics={"rows": 19})
    _, logs = run_on(grid, config, tmp_path / "root")
    assert "on joining it reported 18" in logs[0]["refused"]["south"]


def test_a_silo_cannot_leave_rows_out(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*five())
    grid.faults["train", 1, "e"] = changed(metrics={"rows": 6})
    _, logs = run_on(grid, recipe(*FOUR, *OPEN, "federation.rounds=1"), tmp_path / "root")
    assert list(logs[0]["refused"]) == ["e"]


def test_the_checkpoint_knows_regions(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(*FOUR, *OPEN, "federation.rounds=1")
    run_on(ScriptedGrid(*two_tiers(config, tmp_path, five())), config, tmp_path / "root")  # type: ignore[arg-type]
    assert load_server(tmp_path / "root" / "checkpoint.safetensors").silos == {"north": 2, "south": 3}


@pytest.mark.parametrize(
    "other",
    [
        ("method.name=scaffold", "training.optimizer=sgd"),
        ("method.name=feddpa_f",),
        ("method.name=fdlora",),
        ("method.name=fedamole",),
        ("method.name=local",),
        ("privacy.noise=central",),
        ("privacy.noise=distributed", "privacy.aggregation=secure"),
        ("compression.kind=int8",),
        ("compression.downlink=int8",),
        ("federation.mode=buffered", "federation.buffer=1"),
        ("evaluation.clients=1",),
        ("training.local_seconds=9",),
    ],
)
def test_what_cannot_be_averaged_in_stages_is_refused(recipe: Recipe, other: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="region"):
        check_region(recipe("method.name=fedavg", *other))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("training.lr=1e-4", "training"),
        ("seed=9", "seed"),
        ("federation.rounds=9", "federation.rounds"),
        ("privacy.noise=local", "privacy.noise"),
    ],
)
def test_a_root_with_another_recipe_is_refused(recipe: Recipe, setting: str, named: str) -> None:
    with pytest.raises(FederationError, match=named):
        check_same(recipe("method.name=fedavg", setting), recipe("method.name=fedavg"))
    check_same(
        recipe("method.name=fedavg", "federation.quorum=0.9"),
        recipe(
            "method.name=fedavg",
            "privacy.aggregation=secure",
            "federation.participation=0.5",
            "federation.deadline=1800",
        ),
    )


def test_the_page_names_what_must_be_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    listed = page.partition("Recipes must agree in ")[2].partition(", and in")[0]
    assert re.findall(r"`\[?([\w.]+)\]?`", listed) == [*_SAME, "federation.rounds"]


def test_a_region_that_waits_as_long_as_its_root_is_refused(recipe: Recipe) -> None:
    """One slow silo would make it late in every round; the remedy's setting is accepted."""
    root = recipe("method.name=fedavg", "federation.deadline=500")
    with pytest.raises(FederationError, match=r"--set federation\.deadline=250") as error:
        check_same(root, root)
    check_same(root, recipe("method.name=fedavg", str(error.value).rpartition("--set ")[2]))


def test_a_region_answers_no_other_requests(recipe: Recipe, tmp_path: Path) -> None:
    tier = Tier("north", recipe(*FOUR, *OPEN), tmp_path, *five())
    with pytest.raises(FederationError, match=r"query\.keys"):
        tier.answer("query.keys", RecordDict())


def test_a_round_that_failed_and_is_asked_again_is_one_round(recipe: Recipe, tmp_path: Path) -> None:
    tier = Tier("north", recipe(*FOUR, *OPEN, "federation.rounds=6"), tmp_path, *five()[:2])
    tier.answer("train", train(1))
    for name in "ab":
        tier.grid.faults["train", 2, name] = drop
    with pytest.raises(FederationError, match="quorum"):
        tier.answer("train", train(2))
    tier.grid.faults.clear()
    tier.answer("train", train(2))
    tier.answer("train", train(5))
    inside = tier.region.run.rounds()
    assert [bool(log["clients"]) for log in inside[:4]] == [True, True, False, False]
    assert numbers(tier)[:4] == [1, 2, 3, 4]


def test_a_round_without_quorum_has_no_clients(recipe: Recipe, tmp_path: Path) -> None:
    """One of three silos has sent an update, which is in no mean."""
    tier = Tier("south", recipe(*FOUR, *OPEN), tmp_path, *five()[2:])
    for name in "de":
        tier.grid.faults["train", 1, name] = drop
    with pytest.raises(FederationError, match="quorum"):
        tier.answer("train", train(1))
    tier.answer("train", train(2))
    failed, _ = tier.region.run.rounds()
    assert (failed["clients"], failed["uplink"], failed["declared"]["uplink"]) == ({}, {}, {})
    assert failed["missing"] == ["d", "e"]


def test_a_round_that_failed_and_is_evaluated_is_one_round(recipe: Recipe, tmp_path: Path) -> None:
    """Also where a later one has failed too."""
    config = recipe(*FOUR, *OPEN, "federation.rounds=6", "evaluation.every=1")
    tier = Tier("north", config, tmp_path, *five()[:2])
    for number in (1, 2):
        for name in "ab":
            tier.grid.faults["train", number, name] = drop
        with pytest.raises(FederationError, match="quorum"):
            tier.answer("train", train(number))
        tier.answer("evaluate", evaluate(1))
    assert [log["number"] for log in tier.region.run.rounds()] == [1]
    tier.answer("train", train(3))
    tier.answer("train", train(5))
    assert numbers(tier)[:4] == [1, 2, 3, 4]


def test_a_round_that_is_evaluated_again_has_the_later_scores(recipe: Recipe, tmp_path: Path) -> None:
    """The root was resumed, or the region was killed before its reply was on disk."""
    tier = Tier("north", recipe(*FOUR, *OPEN, "evaluation.every=1"), tmp_path, *five()[:2])
    tier.answer("train", train(1))
    for score in (1.0, 2.0):
        for name in "ab":
            tier.grid.faults["evaluate", 1, name] = changed(metrics={"nll.global": score})
        reply = tier.answer("evaluate", evaluate(1))
        assert metrics_of(reply)["nll.global"] == score
        assert numbers(tier) == [1]
        log = tier.region.run.rounds()[0]
        assert [its["nll.global"] for its in log["scores"].values()] == [score, score]
        assert sorted(log["clients"]) == ["a", "b"]
        assert not log["unscored"]
    tier.answer("train", train(2))
    tier.answer("evaluate", evaluate(2))
    assert numbers(tier) == [1, 2]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_request_that_cannot_be_right_changes_nothing(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    """Neither a round that the run does not have, nor other tensors."""
    tier = Tier("north", recipe(*FOUR, *OPEN), tmp_path, *five()[:2])
    ask = {"train": train, "evaluate": evaluate}[kind]
    with pytest.raises(FederationError, match="rounds 1 to 4"):
        tier.answer(kind, ask(2000))
    with pytest.raises(FederationError, match="expected"):
        tier.answer(kind, ask(3, Payload.of({"w": torch.zeros(3)})))
    assert tier.region.run.rounds() == []
    tier.answer("train", train(1))
    tier.answer("train", train(2))
    with pytest.raises(FederationError, match="2 of them are over"):
        tier.answer(kind, ask(1))
