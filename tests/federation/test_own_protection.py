"""Defences of other packages: found by entry points, run on both sides, refused in words where they are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flexperts.communication.messages import Update
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.registry import make_method
from flexperts.parameters.vector import Manifest, Payload
from flexperts.protection import pipeline
from flexperts.protection.pipeline import (
    check_enough,
    check_protections,
    privacy_spent,
    protect,
    protections,
    reduced,
    told,
)
from flexperts.server.checkpoint import load_server

pytestmark = pytest.mark.usefixtures("shared_base")
Recipe = Callable[..., RunConfig]
SHORT = ("evaluation.max_new_tokens=1", "evaluation.rows=1", "federation.rounds=1")
MODULE = """
from typing import Any

import numpy as np
from pydantic import Field

from flexperts import Protection

class Coarse(Protection):
    hides = frozenset({"loss"})

    class Options(Protection.Options):
        step: float = Field(0.5, gt=0)

    def outgoing(self, change: Any, memory: Any) -> Any:
        return (np.rint(change / self.options.step) * self.options.step).astype(np.float32), None

class First(Protection):
    @property
    def fewest(self) -> int:
        return 3

    def combined(self, changes: Any) -> Any:
        return [change.vector for change in changes][0]

    def spent(self, rounds: int) -> Any:
        return {"mode": "first", "rounds": rounds}
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a package with two defences on the path."""
    info = tmp_path / "site" / "their_defences-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: their-defences\nVersion: 1.0\n")
    places = ("coarse = defences_of_theirs:Coarse", "first = defences_of_theirs:First")
    broken = ("gone = not_there:Coarse", "missing = defences_of_theirs:Not", "dict = builtins:dict")
    (info / "entry_points.txt").write_text("\n".join(["[flexperts.protections]", *places, *broken]))
    (info.parent / "defences_of_theirs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(info.parent)
    pipeline._points.cache_clear()
    yield
    pipeline._points.cache_clear()


def payload(*values: float) -> Payload:
    return Payload(Manifest(("w",), ((len(values),),)), np.array(values, np.float32))


def test_both_sides_are_called(recipe: Recipe) -> None:
    config = recipe("protections={coarse = {step = 0.25}, first = {}}")
    left = protect(config, payload(1, 1), payload(1.3, 0.2), {}, "shop")
    assert left.payload.vector.tolist() == [1.25, 0.25]
    assert left.hidden[0].tolist() == payload(1.3, 0.2).vector.tolist()
    assert told(config, ["loss", "tokens"]) == ["tokens"]
    updates = [Update(name, payload(value, 0), 5, {}) for name, value in (("a", 3), ("b", 4), ("c", 5))]
    (update,) = reduced(config, payload(1, 0), iter(updates))
    assert (update.vector.tolist(), update.rows) == ([3, 0], 15)
    assert privacy_spent(config, 2) == {"mode": "first", "rounds": 2}
    check_protections(make_method(config.method), config)
    check_enough(config, 3)
    with pytest.raises(ConfigError, match=r"\[protections.first\] with 2 clients in a round: .* at least 3"):
        check_enough(config, 2)


def test_packing_comes_last(recipe: Recipe) -> None:
    config = recipe("protections={coarse = {}}", "compression.kind=fp16", "privacy.noise=local")
    assert [type(one).__name__ for one in protections(config)] == ["LocalNoise", "Coarse", "Packing"]
    assert protect(config, payload(0, 0), payload(3, 4), {}, "shop").packed is not None


def test_a_run_sends_what_the_defence_leaves(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("protections={coarse = {step = 0.001}, first = {}}", *SHORT)
    run_federation(config, tmp_path / "run")
    plain = recipe(*SHORT)
    run_federation(plain, tmp_path / "plain")
    ours, theirs = (
        load_server(tmp_path / name / "checkpoint.safetensors").shared.tensors() for name in ("run", "plain")
    )
    changed = np.concatenate(
        [t.numpy().ravel() for name, t in ours.items() if "lora_B" in name]
    )  # B starts at zero
    assert np.abs(changed).max() > 0
    assert np.allclose(changed / 0.001, np.rint(changed / 0.001), atol=1e-3)
    other = np.concatenate([t.numpy().ravel() for name, t in theirs.items() if "lora_B" in name])
    assert not np.allclose(other / 0.001, np.rint(other / 0.001), atol=1e-3)
    assert RunConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["protections={coarze = {}}"],
            "protections.coarze: installed protections are coarse, dict, first, gone, missing; ",
        ),
        (
            ["protections={coarse = {step = 0}}"],
            "protections.coarse: step: Input should be greater than 0; correct",
        ),
        (
            ["protections={coarse = {steps = 1}}"],
            "protections.coarse: steps: Extra inputs are not permitted; correct",
        ),
        (["protections={gone = {}}"], "protections.gone at 'not_there:Coarse': it cannot be imported"),
        (["protections={missing = {}}"], "it cannot be imported"),
        (["protections={dict = {}}"], "it must be a subclass of flexperts.Protection"),
        (
            ["protections={first = {}}", "federation.aggregation=median"],
            "only one defence can make a round's average",
        ),
        (["protections={coarse = {}}", "method.name=local"], "leave out [protections.coarse], or use a method"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run_starts(
    recipe: Recipe, tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_federation(recipe(*settings, *SHORT), tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()
