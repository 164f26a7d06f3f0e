"""The engine on tiny runs: a mixed batch answers as one client at a time, while others come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexperts.errors import ConfigError, DataError, FlexpertsError, ServingError
from flexperts.finished.trained import TrainedRun
from flexperts.serving.contract import ModelName, Piece, Sampling
from flexperts.serving.engine.batch import Batch
from flexperts.serving.engine.engine import ServingEngine

from .disturbed_run import (
    LENGTH,
    QUESTIONS,
    Asked,
    Recipe,
    ask,
    ask_all,
    ask_in_waves,
    disturbed_run,
    everything,
    serving,
)

CLINIC, SHOP = ModelName("clinic", "personalized"), ModelName("shop", "personalized")
LONG = Sampling(900)


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A FLEx run with whole personal experts."""
    return disturbed_run(recipe, tmp_path_factory.mktemp("runs") / "flex")


@pytest.fixture
def engine(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingEngine]:
    monkeypatch.setattr(trained, "close", lambda: None)  # other tests use it again
    with serving(trained, max_rows=16) as engine:
        yield engine


# The same answers.

MIXABLE = {
    "whole experts, k = 2": ("graft.experts=2",),
    "low rank, k = 2": ("graft.experts=2", "graft.rank=4", "graft.scale=0.5"),
    "gates from the router": ("graft.gate_start=router",),
    "a common graft and one's own": ("graft.sharing=both",),
    "differences of whole experts, k = 2": ("graft.output=difference", "graft.experts=2"),
    "differences of low rank": ("graft.output=difference", "graft.rank=4", "graft.sharing=both"),
    "one layer, every projection": ("graft.layers=[1]", "lora.projections=[]"),
    "an adapter of one's own": ("method.name=ditto",),
    "a head of one's own": ("method.name=fedper",),
}
OWN = {
    "adapted experts": ("graft.place=in_place",),
    "weights by prompt": ("method.name=feddpa_t",),
    "weights by token": ("method.name=fedalt", "lora.alpha=128"),
}


def test_a_mixed_batch_answers_as_one_client_at_a_time(engine: ServingEngine, trained: TrainedRun) -> None:
    _compare(engine, trained, everything(trained))
    assert engine.counters.prefills == 1 + len(engine.models)


@pytest.mark.parametrize("overrides", MIXABLE.values(), ids=MIXABLE.keys())
def test_whatever_grafts_and_adapters_they_have(recipe: Recipe, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", *overrides)
    with serving(trained) as engine:
        _compare(engine, trained, everything(trained))
        assert engine.counters.prefills == 1 + len(engine.models)


@pytest.mark.parametrize("overrides", OWN.values(), ids=OWN.keys())
def test_other_parts_are_served_a_model_at_a_time(
    recipe: Recipe, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", *overrides)
    with serving(trained) as engine:
        _compare(engine, trained, everything(trained))


def _compare(engine: ServingEngine, trained: TrainedRun, asks: list[tuple[ModelName, str]]) -> None:
    """Ask the run itself while the engine has not set the base up yet, then all together, then one by one."""
    ordinary = [trained.generate(model.client, question, state=model.state) for model, question in asks]
    together = ask_all(engine, asks)
    alone = [ask_all(engine, [one])[0] for one in asks]
    assert [asked.tokens for asked in together] == [asked.tokens for asked in alone]
    assert [asked.wait().strip() for asked in together] == ordinary
    assert len(set(ordinary)) > len(trained.clients)


def test_who_joins_midway_gets_the_same_answer_and_disturbs_nobody(engine: ServingEngine) -> None:
    asks = [(model, QUESTIONS[number % 4]) for number, model in enumerate(engine.models)]
    alone = [ask_all(engine, [one])[0].tokens for one in asks]
    before = engine.counters
    waves = ask_in_waves(engine, asks, 3)
    assert [asked.tokens for asked in waves] == alone
    assert engine.counters.prefills - before.prefills == 4
    assert engine.counters.steps - before.steps < 3 * LENGTH  # they did share batches


def test_answers_of_different_lengths_leave_one_by_one(engine: ServingEngine) -> None:
    lengths = [3, 17, 1, 8]
    alone = []
    for length in lengths:
        asked = ask(engine, CLINIC, QUESTIONS[1], Sampling(length))
        asked.wait()
        alone.append(asked.tokens)
    together = [ask(engine, CLINIC, QUESTIONS[1], Sampling(length)) for length in lengths]
    for asked in together:
        asked.wait()
    assert [a.tokens for a in together] == alone
    assert [len(tokens) for tokens in alone] == lengths
    assert {a.pieces[-1].finish for a in together} == {"length"}


# Drawing.


def test_a_seed_decides_an_answer_whatever_the_company(engine: ServingEngine) -> None:
    def drawn(seed: int) -> Sampling:
        return Sampling(LENGTH, temperature=1.5, top_p=0.9, seed=seed)

    alone = ask(engine, CLINIC, "Hi", drawn(3))
    alone.wait()
    company = [ask(engine, SHOP, question) for question in QUESTIONS]
    among = [ask(engine, CLINIC, "Hi", drawn(seed)) for seed in (3, 4)]
    for asked in (*company, *among):
        asked.wait()
    assert among[0].tokens == alone.tokens != among[1].tokens


# Coming and going.


def test_a_cancelled_request_ends_and_the_others_go_on(engine: ServingEngine) -> None:
    alone = ask_all(engine, [(SHOP, "Hi")])[0].tokens
    gone, other = ask(engine, CLINIC, "Why?", LONG), ask(engine, SHOP, "Hi")
    gone.next()
    gone.request.cancel()
    gone.wait()
    other.wait()
    assert gone.pieces[-1] == Piece("", 0, "cancelled")
    assert len(gone.tokens) < 900
    assert other.tokens == alone


def test_a_request_cancelled_in_the_queue_is_never_read(trained: TrainedRun, monkeypatch: Any) -> None:
    monkeypatch.setattr(trained, "close", lambda: None)
    with serving(trained, max_rows=1) as engine:
        running = ask(engine, CLINIC, "Why?", LONG)
        running.next()
        waiting = ask(engine, SHOP, "Hi")
        assert engine.queue_length == 1
        waiting.request.cancel()
        waiting.wait()
        running.request.cancel()
        running.wait()
        assert waiting.pieces == [Piece("", 0, "cancelled")]
        assert engine.counters.prefills == 1
        assert engine.queue_length == 0


def test_limits_of_a_batch_hold_and_nobody_overtakes(trained: TrainedRun, monkeypatch: Any) -> None:
    monkeypatch.setattr(trained, "close", lambda: None)
    sizes: list[tuple[int, int]] = []
    whole_step = Batch.step

    def step(self: Batch) -> None:
        sizes.append((len(self.rows), len(self.rows) * max(row.most_tokens for row in self.rows)))
        whole_step(self)

    monkeypatch.setattr(Batch, "step", step)
    ended: list[int] = []
    with serving(trained, max_rows=3, max_tokens=400) as engine:
        found = []
        for number in range(9):
            asked = Asked()

            def hear(piece: Piece, number: int = number, asked: Asked = asked) -> None:
                if piece.finish:
                    ended.append(number)
                asked.hear(piece)

            question = QUESTIONS[1] * (3 if number == 4 else 1)
            prompt = engine.prompt_tokens([{"role": "user", "content": question}])
            asked.request = engine.submit(CLINIC, prompt, Sampling(LENGTH), hear)
            found.append(asked)
        for asked in found:
            asked.wait()
    assert ended == sorted(ended)
    assert max(rows for rows, _ in sizes) == 3
    assert all(tokens <= 400 for _, tokens in sizes)


def test_models_that_cannot_mix_do_not_starve_each_other(recipe: Recipe, tmp_path: Path) -> None:
    trained = disturbed_run(recipe, tmp_path / "run", "graft.place=in_place")
    with serving(trained) as engine:
        alone = [ask_all(engine, [(model, "Hi")])[0].tokens for model in (SHOP, CLINIC)]
        running = ask(engine, CLINIC, "Why?", Sampling(60))
        running.next()
        other, same = (ask(engine, model, "Hi") for model in (SHOP, CLINIC))
        same.next()  # it could have joined the one that runs, but the other was there before
        assert running.request.ended
        assert other.request.ended
        for asked in (running, other, same):
            asked.wait()
        assert [other.tokens, same.tokens] == alone


# Failing.


def test_a_failure_of_one_request_is_its_own(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ask_all(engine, [(SHOP, "Hi")])[0].tokens

    def deaf(_piece: Piece) -> None:
        raise RuntimeError("the line is dead")

    prompt = engine.prompt_tokens([{"role": "user", "content": "Hi"}])
    engine.submit(CLINIC, prompt, LONG, deaf)
    broken = ask(engine, CLINIC, "Why?", Sampling(900, temperature=1.0, seed=0))
    monkeypatch.setattr(broken.request.answer, "draw", lambda logits: 1 / 0)
    good = ask(engine, SHOP, "Hi")
    good.wait()
    broken.wait()
    assert good.tokens == alone
    assert broken.pieces[-1].finish == "error"
    assert "ZeroDivisionError" in str(broken.pieces[-1].error)
    assert engine.failure is None
    assert engine.counters.failed == 1


def test_a_failed_batch_is_told_to_all_its_rows_and_the_next_one_works(
    engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def forward(*_: object) -> None:
            patch.undo()  # the base itself still computes
            raise torch.OutOfMemoryError("no room")

        patch.setattr("flexperts.serving.engine.batch.next_logits", forward)
        found = ask_all(engine, [(CLINIC, "Hi"), (SHOP, "Why?")])
    assert all(isinstance(asked.pieces[-1].error, ServingError) for asked in found)
    assert all("OutOfMemoryError" in str(asked.pieces[-1].error) for asked in found)
    assert not any("no room" in str(asked.pieces[-1].error) for asked in found)  # a message may quote a prompt
    assert engine.failure is None
    assert engine.running == 0
    assert ask_all(engine, [(CLINIC, "Hi")])[0].pieces[-1].finish == "length"


def test_when_the_engine_breaks_everybody_hears_it(trained: TrainedRun, monkeypatch: Any) -> None:
    monkeypatch.setattr(trained, "close", lambda: None)
    with serving(trained, max_rows=1) as engine:
        running = ask(engine, CLINIC, "Hi", LONG)
        running.next()
        waiting = ask(engine, SHOP, "Hi")
        monkeypatch.setattr(ServingEngine, "_advance", lambda self: 1 / 0)
        for asked in (running, waiting):
            asked.pieces.clear()
            asked.wait()
            assert "ZeroDivisionError" in str(asked.pieces[-1].error)
        assert isinstance(engine.failure, ServingError)
        with pytest.raises(ServingError, match="ZeroDivisionError"):
            ask(engine, CLINIC, "Hi")


def test_closing_ends_all_requests(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "close", lambda: None)
    with serving(trained, max_rows=1) as engine:
        running, waiting = ask(engine, CLINIC, "Hi", LONG), ask(engine, SHOP, "Hi")
        running.next()
    for asked in (running, waiting):
        asked.wait()
        assert (asked.pieces[-1].finish, asked.pieces[-1].error) == ("cancelled", None)
    with pytest.raises(ServingError, match="closed"):
        ask(engine, CLINIC, "Hi")


# What is refused.


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0), "max_tokens = 0"),
        (Sampling(1, temperature=-1.0), "temperature"),
        (Sampling(1, temperature=float("nan")), "temperature"),
        (Sampling(1, top_p=0.0), "top_p"),
        (Sampling(1, stop=("",)), "stop"),
    ],
)
def test_values_out_of_range_are_refused(engine: ServingEngine, sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(engine, CLINIC, "Hi", sampling)


def test_a_prompt_must_fit_and_an_answer_ends_where_the_context_does(engine: ServingEngine) -> None:
    with pytest.raises(DataError, match="context of 1024"):
        engine.prompt_tokens([{"role": "user", "content": "x" * 1024}])
    with pytest.raises(DataError, match="0 tokens"):
        engine.submit(CLINIC, [], Sampling(1), print)
    asked = Asked()
    asked.request = engine.submit(CLINIC, [5] * 1021, LONG, asked.hear)
    asked.wait()
    assert len(asked.tokens) == 3
    assert asked.pieces[-1].finish == "length"


@pytest.mark.parametrize(
    "messages", [[], [{"role": "assistant", "content": "Hi"}], [{"role": "tool", "content": "Hi"}]]
)
def test_conversations_end_with_the_user(engine: ServingEngine, messages: Any) -> None:
    with pytest.raises(ConfigError, match="roles"):
        engine.prompt_tokens(messages)


def test_a_model_that_is_not_there_is_refused(engine: ServingEngine) -> None:
    for name in (ModelName("clinics", "personalized"), ModelName("clinic@global", "personalized")):
        with pytest.raises(FlexpertsError, match="no such model"):
            engine.submit(name, [5], Sampling(1), print)


def test_a_base_that_computes_no_more_ends_the_engine(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(trained, "close", lambda: None)
    with serving(trained) as engine:
        monkeypatch.setattr("flexperts.serving.engine.batch.next_logits", broken)
        asked = ask(engine, CLINIC, "Hi")
        asked.wait()
        engine._thread.join(10)
        assert "RuntimeError" in str(engine.failure)
