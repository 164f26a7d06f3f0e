"""The models among which a client chooses where a run has a ``[floor]``, and the states that it can then use."""

from __future__ import annotations

from flexperts.config.run import RunConfig
from flexperts.errors import ConfigError
from flexperts.methods.kit.method import Method, State

MIXTURES = {f"mixture {weight}": weight for weight in (0.25, 0.5, 0.75)}
"""Candidate -> weight of the personal part between the global model (0) and the personalized one (1)."""
CANDIDATES = ("zero_shot", "global", "local", "personalized", *MIXTURES)
"""All candidates, from simple to complex."""


def states_of(method: Method, config: RunConfig, number: int) -> tuple[State, ...]:
    """Return the states in which a client's model can be used after a round, its own one last."""
    ends = number == method.total_rounds(config.federation.rounds)
    return (*method.states, "chosen") if config.floor and ends else method.states


def candidates_of(method: Method, config: RunConfig) -> list[str]:
    """Return the candidates that a recipe's ``[floor]`` asks for and the method has, from simple to complex."""
    assert config.floor is not None
    asked, has = {"zero_shot", *config.floor.candidates}, {*method.states, "local"}
    if method.mixes(config) and {"global", "personalized"} <= has:
        has.add("mixture")
    return [name for name in CANDIDATES if name.partition(" ")[0] in asked & has]


def check_candidates(method: Method, config: RunConfig) -> None:
    """Refuse a floor with no trained model to choose."""
    if not config.floor or method.states == ("zero_shot",) or candidates_of(method, config) != ["zero_shot"]:
        return
    named = ", ".join(f'"{name}"' for name in config.floor.candidates)
    has = [state for state in method.states if state != "zero_shot"]
    raise ConfigError(
        f"floor.candidates = [{named}] with method.name = {method.name}",
        "the method has none of them, so each client would keep the untouched base",
        f"add {' or '.join((*has, 'local'))}, or leave [floor] out",
    )
