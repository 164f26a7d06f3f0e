"""A run's lines, from events at times of a clock that the test sets."""

from __future__ import annotations

import pytest

from flexperts.observer import Observer, TurnState
from flexperts.progress import Line, RunProgress


class Clock:
    """Seconds that only the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> RunProgress:
    return RunProgress(clock)


def train(client: str, done: int, loss: float | None = None, tokens: int = 0, number: int = 1) -> TurnState:
    return TurnState(client, "training", f"round {number}", done, 10, loss, tokens)


def test_a_stage_lasts_until_the_next(progress: RunProgress, clock: Clock) -> None:
    clock.now += 3
    assert progress.lines() == [Line("starting", "0:00:03")]
    progress.stage("loading a base")
    clock.now += 75
    assert [str(line) for line in progress.lines()] == ["loading a base: 0:01:15"]


def test_turns_of_two_clients_interleave(progress: RunProgress, clock: Clock) -> None:
    progress.run("flex, seed 0")
    progress.phase("training", 4, 2, 5)
    for done in range(1, 6):
        clock.now += 2
        progress.turn(train("a", done, 3.0, 100 * done, 2))
        progress.turn(train("b", 2 * done, 1.0, 200 * done, 2))
    run, a, b = progress.lines()
    # 0.5 and 1 of 4 turns are done after 10 s; 28.5 more are left of 5 - 1 rounds with 4 turns.
    assert run.text == "flex, seed 0, round 2 of 5, training"
    assert (run.done, run.total) == (1.5, 4)
    # From the first event, with a's 100 tokens, 8 s pass until all 1,500 are trained on.
    assert run.facts == "0 of 4 clients, loss 2.000, 175 tokens/s, ETA 0:01:37"
    assert str(a) == "  a: training, round 2: 5 of 10 steps, loss 3.000"
    assert (b.text, b.facts, b.done, b.total) == ("  b: training, round 2", "10 of 10 steps, loss 1.000", 10, 10)
    progress.turn_ended("b")
    run, a = progress.lines()
    assert (run.done, a.text) == (1.5, "  a: training, round 2")
    assert run.facts.startswith("1 of 4 clients, loss 2.000, ")  # b's last loss counts for the round


def test_a_turn_begins_with_a_selection(progress: RunProgress) -> None:
    progress.phase("training", 2, 1, 1)
    progress.turn(TurnState("a", "selection", "selection", 0, 0))
    run, a = progress.lines()
    assert (run.text, run.done) == ("round 1 of 1, selection", 0)
    assert str(a) == "  a: selection: 0 batches"
    progress.turn(TurnState("a", "selection", "selection", 3, 8))
    progress.turn(train("b", 1, 2.5))
    run, a, b = progress.lines()
    assert run.text == "round 1 of 1, training"
    assert (a.facts, b.facts) == ("3 of 8 batches", "1 of 10 steps, loss 2.500")
    progress.turn(train("a", 5, 1.5))
    assert len(progress.lines()) == 3
    assert progress.lines()[0].done == pytest.approx(0.6)


def test_a_repeated_turn_adds_no_negative_tokens(progress: RunProgress, clock: Clock) -> None:
    progress.phase("training", 2, 1, 1)
    for done, tokens in ((1, 100), (2, 300), (1, 100), (2, 300)):  # its worker died, and a new one starts again
        progress.turn(train("a", done, 1.0, tokens))
        clock.now += 1
    assert "100 tokens/s" in progress.lines()[0].facts  # 400 in the 4 s after the first event


def test_tokens_per_second_forget_what_was_long_ago(progress: RunProgress, clock: Clock) -> None:
    progress.phase("training", 1, 1, 1)
    tokens = 0
    for step in range(1, 200):
        clock.now += 1
        tokens += 1000 if step < 100 else 50
        progress.turn(TurnState("a", "training", "round 1", step, 400, 1.0, tokens))
    assert "50 tokens/s" in progress.lines()[0].facts


def test_the_time_left_counts_rounds_and_phases(progress: RunProgress, clock: Clock) -> None:
    progress.phase("joining", 2)
    progress.phase("training", 2, 3, 4)  # a resumed run
    assert progress.lines()[0].facts == "0 of 2 clients, 0:00:00"
    clock.now += 20
    progress.turn_ended("a")
    assert progress.lines()[0].facts.endswith("ETA 0:01:00")  # half of 2 rounds' quarters
    clock.now += 20
    progress.phase("evaluation", 2, 3, 4)
    assert progress.lines()[0].facts == "0 of 2 clients, 0:00:00"
    clock.now += 8
    progress.turn(TurnState("a", "evaluation", "global answers", 5, 10))
    assert progress.lines()[0].facts.endswith("ETA 0:01:04")  # 8 * 3 here, 40 in the next round
    progress.round({})
    progress.phase("training", 2, 4, 4)
    clock.now += 12
    progress.turn_ended("a")
    assert progress.lines()[0].facts.endswith("ETA 0:00:20")  # 60 s for 1.5 rounds
    progress.round({})
    assert progress.lines() == []
    progress.stage("other clients' rows")
    progress.phase("joining", 2)  # the reference method's run
    progress.phase("training", 2, 1, 4)
    clock.now += 10
    progress.turn_ended("a")
    assert progress.lines()[0].facts.endswith("ETA 0:01:10")


def test_without_phases_clients_work_in_turn(progress: RunProgress) -> None:
    progress.stage("MMLU")
    for client in "abc":
        progress.turn(TurnState(client, "evaluation", "global MMLU", 3, 0))
    assert [line.text for line in progress.lines()] == ["MMLU", "  c: evaluation, global MMLU"]
    progress.stage("done")
    assert [line.text for line in progress.lines()] == ["done"]


def test_a_task_is_shown_until_it_is_done(progress: RunProgress) -> None:
    progress.progress("copying", 1, 3)
    progress.progress("hashing", 2, 4)
    assert progress.lines()[1:] == [Line("copying", "1 of 3", 1, 3), Line("hashing", "2 of 4", 2, 4)]
    progress.progress("copying", 3, 3)
    assert [line.text for line in progress.lines()] == ["starting", "hashing"]


def test_an_observer_without_turns_hears_of_progress() -> None:
    heard = []

    class Older(Observer):
        def progress(self, task: str, done: int, total: int) -> None:
            heard.append((task, done, total))

    older = Older()
    older.turn(train("a", 0))
    older.turn(train("a", 1))
    assert heard == [("a: round 1", 1, 10)]
