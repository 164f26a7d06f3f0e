"""A standing HTTP server over a scripted engine, and the official client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from flexperts.config.run import RunConfig

from .scripted_engine import ScriptedEngine, Served, openai_of, served


@pytest.fixture(scope="session")
def recipe(recipe: Callable[..., RunConfig], byte_base: Path) -> Callable[..., RunConfig]:
    """The same on the base of bytes, whose answers differ more."""
    return lambda *overrides: recipe(f"model.base={byte_base}", *overrides)


@pytest.fixture(scope="module")
def standing() -> Iterator[tuple[ScriptedEngine, Served]]:
    """A server for the tests that leave it as it was."""
    engine = ScriptedEngine()
    with served(engine) as running:
        yield engine, running


@pytest.fixture
def server(standing: tuple[ScriptedEngine, Served]) -> Served:
    return standing[1]


@pytest.fixture
def shared(standing: tuple[ScriptedEngine, Served]) -> ScriptedEngine:
    """The standing server's engine, without memory of the tests before."""
    engine, _ = standing
    engine.asked.clear()
    engine.conversations.clear()
    return engine


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine for a server of the test's own."""
    return ScriptedEngine()


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai_of(server) as client:
        yield client
