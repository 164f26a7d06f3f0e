"""The pool of worker processes: order, window, errors, events, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import calls
import psutil
import pytest

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.fork_server import Setting
from flexperts.engines.pool import Call, Pool
from flexperts.errors import DataError, FederationError, ModelError
from flexperts.observer import Observer, observing

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def setting(recipe: Recipe) -> Setting:
    return Setting(Workspace(recipe("data.silos.train_rows=4")).rows_only(), threads=1)


@pytest.fixture(scope="module")
def pool(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(setting, 2, tmp_path_factory.mktemp("waiting"))
    yield pool
    pool.close()


def call(function: Callable[..., object], *arguments: object) -> Call:
    return Call(function.__name__, function, arguments)


def test_results_come_in_the_order_of_the_calls(pool: Pool, tmp_path: Path) -> None:
    signpost = str(tmp_path / "signpost")
    late = [
        call(calls.after, signpost, "first"),
        *(call(calls.echo, n) for n in range(3)),
        call(calls.make, signpost),
    ]
    assert list(pool.results(late)) == ["first", 0, 1, 2, signpost]


def test_calls_are_taken_as_workers_become_free_and_only_so_far_ahead(pool: Pool, tmp_path: Path) -> None:
    signpost, taken = tmp_path / "signpost", []

    def many() -> Iterator[Call]:
        yield call(calls.after, str(signpost), "first")
        for number in range(20):
            taken.append(number)
            if number == 6:
                signpost.touch()  # the window of 8 is full: the first one, and 0 to 6
            yield call(calls.echo, number)

    results = pool.results(many())
    assert next(results) == "first"
    assert len(taken) <= 8
    assert list(results) == list(range(20))


def test_workers_share_the_base_and_live_on(pool: Pool) -> None:
    first = set(pool.results(call(calls.process) for _ in range(8)))
    assert set(pool.results(call(calls.process) for _ in range(8))) | first <= set(children())
    assert len(first) <= 2
    assert len(set(pool.results(call(calls.address) for _ in range(8)))) == 1


def test_our_errors_arrive_as_they_are_and_others_with_their_traceback(pool: Pool) -> None:
    with pytest.raises(DataError, match="a row: it breaks a rule; fix it"):
        list(pool.results([call(calls.refuse)]))
    with pytest.raises(RuntimeError, match=r"in fail(.|\n)*ZeroDivisionError: by nought"):
        list(pool.results([call(calls.fail)]))
    assert list(pool.results([call(calls.echo, "still here")])) == ["still here"]


def test_results_of_an_abandoned_iterator_are_not_taken_for_later_ones(pool: Pool) -> None:
    abandoned = pool.results([call(calls.echo, n) for n in range(6)])
    assert next(abandoned) == 0
    abandoned.close()
    assert list(pool.results(call(calls.echo, "new") for _ in range(4))) == ["new"] * 4


def test_events_reach_the_parents_observer(pool: Pool) -> None:
    heard: list[str] = []

    class Ear(Observer):
        def notice(self, text: str) -> None:
            heard.append(text)

    with observing(Ear()):
        list(pool.results([call(calls.say, "a"), call(calls.say, "b")]))
    assert sorted(heard) == ["a", "b"]


def test_a_dead_workers_call_is_repeated_once(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    mixed = [call(calls.echo, 1), call(calls.die, str(tmp_path / "once"), 1), call(calls.echo, 2)]
    assert list(pool.results(mixed)) == [1, "alive", 2]
    with pytest.raises(FederationError, match=r"^die: two worker processes died in it"):
        list(pool.results([call(calls.die, str(tmp_path / "twice"), 2)]))
    assert list(pool.results([call(calls.echo, 3)])) == [3]


def test_an_error_of_a_call_is_raised_at_its_turn(pool: Pool) -> None:
    results = pool.results([call(calls.echo, 1), call(calls.refuse), call(calls.echo, 2)])
    assert next(results) == 1
    with pytest.raises(DataError):
        next(results)


@pytest.mark.faults
def test_a_dead_fork_server_is_replaced_and_close_leaves_no_process(setting: Setting, tmp_path: Path) -> None:
    before = set(children())
    pool = Pool(setting, 2, tmp_path)
    try:
        [worker] = pool.results([call(calls.process)])
        os.kill(psutil.Process(worker).ppid(), signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        [other] = pool.results([call(calls.process)])
        assert other != worker
    finally:
        pool.close()
    assert set(children()) <= before
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_cannot_be_loaded_is_refused_as_in_one_process(recipe: Recipe, tmp_path: Path) -> None:
    workspace = Workspace(recipe("data.silos.train_rows=4"))
    rows = workspace.rows_only()
    rows.config = rows.config.model_copy(
        update={"model": rows.config.model.model_copy(update={"base": str(tmp_path / "none")})}
    )
    pool = Pool(Setting(rows, threads=1), 1, tmp_path)
    try:
        with pytest.raises(ModelError, match="none"):
            list(pool.results([call(calls.echo, 1)]))
    finally:
        pool.close()


def children() -> list[int]:
    return [process.pid for process in psutil.Process().children(recursive=True)]
