"""What `flexperts run` shows of memory: a table for large bases, a refusal where it does not fit, else nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flexperts.config.run import RunConfig
from flexperts.errors import ModelError
from flexperts.terminal import preflight
from flexperts.terminal.preflight import check_memory, clients_in_memory


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every base count as large."""
    monkeypatch.setattr(preflight, "_SMALL", 0)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("flexperts.costs.preflight.free_bytes", lambda device: count)


def test_a_small_base_is_not_worth_a_word(
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    check_memory(recipe())
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("large")
def test_the_table_has_every_phase(
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**10)
    check_memory(recipe())
    said = capsys.readouterr().out
    assert all(word in said for word in ("selection", "training", "evaluation", "optimizer", "of 10.00 GB free"))


@pytest.mark.usefixtures("large")
def test_what_does_not_fit_is_refused_unless_asked(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**6)
    with pytest.raises(ModelError, match=r"0.0 GB are free; reduce memory \(.*model.preflight = false"):
        check_memory(recipe())
    check_memory(recipe("model.preflight=false"))


@pytest.mark.usefixtures("large")
def test_a_run_that_cannot_be_estimated_is_not_stopped(
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    check_memory(recipe("method.name=scaffold"))  # refused by the method itself, in its own words
    assert "memory: not estimated" in capsys.readouterr().out


@pytest.mark.usefixtures("large")
def test_a_server_of_a_large_base_is_refused_before_it_starts(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def places(count: int, asked: int | None = None, *overrides: str) -> int | None:
        monkeypatch.setattr("flexperts.costs.serving.free_bytes", lambda device: count)
        return clients_in_memory(recipe(*overrides), ["a", "b", "c"], asked, max_rows=2, max_tokens=64)

    with pytest.raises(ModelError, match=r"serving this run needs .* on cpu, process most of it: 0.0 GB are free"):
        places(10**6)
    assert places(10**6, 2, "model.preflight=false") == 2
    assert capsys.readouterr().err == ""
    assert places(10**12) == 3
    assert places(10**12, 2) == 2
    assert "the models of 2 of 3 clients at a time" in capsys.readouterr().err


def test_a_server_of_a_small_base_keeps_what_was_asked(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexperts.costs.serving.free_bytes", lambda device: 0)
    assert clients_in_memory(recipe(), ["a"], None, max_rows=2, max_tokens=64) is None
