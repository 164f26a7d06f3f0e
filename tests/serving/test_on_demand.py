"""Models are loaded when they are asked for, and the least recently used leave; answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexperts.errors import ArtifactError, ConfigError
from flexperts.finished.trained import TrainedRun
from flexperts.serving.contract import ModelName, Sampling
from flexperts.serving.engine.engine import ServingEngine
from flexperts.serving.engine.lanes import Lanes

from .disturbed_run import Recipe, ask, ask_all, disturbed_run, everything, serving


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A FLEx run with whole personal experts."""
    return disturbed_run(recipe, tmp_path_factory.mktemp("runs") / "flex")


@pytest.fixture(autouse=True)
def stays_open(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "close", lambda: None)


def own(client: str) -> ModelName:
    return ModelName(client, "personalized")


def held(lanes: Lanes) -> set[str]:
    """Return the clients with personal experts in memory, counted where they are."""
    [keys] = {frozenset(layer.personal) for layer in lanes._mixed._grafts._layers} or {frozenset()}
    return {name.client for name, (_, grafts) in lanes._mixed._keys.items() if grafts in keys}


def test_nothing_is_loaded_before_it_is_asked_for_and_the_least_recently_used_leaves(trained: TrainedRun) -> None:
    lanes, (a, b, c, _) = Lanes(trained, 2), trained.clients
    assert held(lanes) == set()
    lanes[ModelName(a, "zero_shot")]  # the base needs no state
    assert held(lanes) == set()
    lanes[own(a)], lanes[own(b)]
    assert held(lanes) == {a, b}
    lanes[ModelName(a, "global")]  # now b is the one not used for longest
    lanes[own(c)]
    assert held(lanes) == {a, c}
    assert lanes.in_memory(own(b)) is None
    lanes.load(own(b), {a})
    assert held(lanes) == {a, b}


def test_a_client_is_read_once_for_all_its_models(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, lanes = _counted(monkeypatch), Lanes(trained)
    for state in trained.model.method.states:
        lanes[ModelName("clinic", state)]
    assert reads == ["clinic.safetensors"]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_answers_do_not_depend_on_how_many_fit(trained: TrainedRun, most: int) -> None:
    asks = everything(trained)
    with serving(trained) as engine:
        expected = [asked.tokens for asked in ask_all(engine, asks)]
    with serving(trained, max_clients=most) as engine:
        assert [asked.tokens for asked in ask_all(engine, asks)] == expected
        assert [asked.tokens for asked in ask_all(engine, asks[::-1])] == expected[::-1]
        assert len(held(engine._lanes)) == most


def test_a_load_between_tokens_disturbs_no_row_that_is_running(trained: TrainedRun) -> None:
    a, b, *_ = trained.clients
    with serving(trained, max_clients=2) as engine:
        long = Sampling(60)
        alone = [ask(engine, own(client), "Why?", long) for client in (a, a)]
        for asked in alone:
            asked.wait()
        running = ask(engine, own(a), "Why?", long)
        running.next()
        joining = ask(engine, own(b), "Hi")
        joining.wait()
        running.wait()
        assert running.tokens == alone[0].tokens
        assert engine.counters.steps < 2 * 60 + 60  # b joined the batch that was running
        assert joining.tokens == ask_all(engine, [(own(b), "Hi")])[0].tokens


def test_a_damaged_state_ends_its_requests_and_no_others(recipe: Recipe, tmp_path: Path) -> None:
    run = disturbed_run(recipe, tmp_path / "run")
    path = run.client("shop").store.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with serving(run) as engine:
        broken, good = ask_all(engine, [(own("shop"), "Hi"), (own("clinic"), "Hi")])
        assert broken.pieces[-1].finish == "error"
        assert "checksum" in str(broken.pieces[-1].error)
        assert good.pieces[-1].finish == "length"
        assert engine.failure is None


def test_a_missing_state_is_refused_before_anything_is_served(recipe: Recipe, tmp_path: Path) -> None:
    run = disturbed_run(recipe, tmp_path / "run")
    run.client("shop").store.path.unlink()
    with pytest.raises(ArtifactError, match=r"shop\.safetensors"):
        Lanes(run)
    run.close()


def test_room_for_no_client_is_refused(trained: TrainedRun) -> None:
    with pytest.raises(ConfigError, match="max_clients = 0"):
        ServingEngine(trained, max_clients=0)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of every personal state that is read whole."""
    from flexperts.parameters import store

    reads, read = list[str](), store.load_personal

    def counted(path: Any, **how: Any) -> Any:
        reads.append(Path(path).name)
        return read(path, **how)

    monkeypatch.setattr(store, "load_personal", counted)
    return reads
