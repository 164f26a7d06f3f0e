"""Two phases in a round, and the settings that leave a phase without parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.registry import make_method

ALTERNATING = 'method.options={phases="alternating"}'


@pytest.mark.parametrize(("steps", "share", "personal"), [(3, 0.5, 2), (4, 0.25, 1), (5, 0.5, 2), (2, 0.01, 1)])
def test_the_phases_of_flex_take_the_round_s_steps_and_no_more(
    take_turn: Any, moves: Callable[..., Any], steps: int, share: float, personal: int
) -> None:
    """round(share x steps), at least 1, for the personal part; all others for the shared one."""
    seen: list[set[str]] = []
    options = f'method.options={{phases="alternating", personal_share={share}}}'
    with take_turn("graft.rank=2", options) as (method, turn):
        turn = replace(turn, settings=replace(turn.settings, steps=steps))
        turn.on_step = moves(seen, lambda: turn)
        result = method.train(turn)
    assert result.steps == len(seen) == steps
    assert seen[1:personal] == [{"personal"}] * (personal - 1)  # the first step has nothing to compare with
    assert seen[personal:] == [{"shared"}] * (steps - personal)


def test_a_phase_without_parameters_is_refused(recipe: Callable[..., RunConfig]) -> None:
    config = recipe("graft.sharing=shared", ALTERNATING)
    with pytest.raises(ConfigError, match="nothing personal"):
        make_method(config.method).check(config)
    for fine in (recipe("graft.sharing=both", ALTERNATING), recipe("graft.sharing=shared")):
        make_method(fine.method).check(fine)


def test_local_has_no_shared_part_to_set(recipe: Callable[..., RunConfig]) -> None:
    for options in (ALTERNATING, "method.options={pull=0.1}"):
        with pytest.raises(ConfigError, match="local has no option"):
            make_method(recipe("method.name=local", options).method)
    config = recipe("method.name=local", "graft.sharing=both")
    with pytest.raises(ConfigError, match="sends nothing"):
        make_method(config.method).check(config)


def test_a_share_of_no_phase_is_refused(recipe: Callable[..., RunConfig]) -> None:
    config = recipe("method.options={personal_share=0.9}")
    with pytest.raises(ConfigError, match=r"personal_share = 0\.9: both parts train together"):
        make_method(config.method).check(config)


@pytest.mark.parametrize("name", ["ditto", "feddpa_t"])
def test_both_fits_share_the_seconds_of_a_round(take_turn: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with take_turn(f"method.name={name}", round=2) as (method, turn):
        fit, seconds = type(turn).fit, []

        def spy(its: Any, **settings: Any) -> Any:
            seconds.append(settings["settings"].seconds)
            return fit(its, **settings)

        monkeypatch.setattr(type(turn), "fit", spy)
        method.receive(turn)
        for given, each in ((60.0, 30.0), (None, None)):
            turn.settings = replace(turn.settings, seconds=given)
            assert method.train(turn).steps == 2 * turn.settings.steps
            assert seconds == [each, each]
            seconds.clear()
