"""Methods of other packages: found by entry points, and refused in words where they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexperts.errors import ConfigError
from flexperts.methods import registry
from flexperts.methods.fedavg import FedAvg

pytestmark = pytest.mark.usefixtures("own_registry")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *points: str) -> None:
    """Put a package with entry points on the path."""
    installed = folder / "their_methods-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: their-methods\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("\n".join(["[flexperts.methods]", *points]))
    monkeypatch.syspath_prepend(folder)
    registry._find_installed.cache_clear()


def test_an_installed_method_is_known_and_imported_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "theirs = flexperts.methods.fedavg:FedAvg", "later = not_there:Method")
    assert {"theirs", "later", "flex"} <= set(registry.method_names())
    assert registry.method_class("theirs") is FedAvg


def test_a_name_that_is_taken_is_refused_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "flex = flexperts.methods.fedavg:FedAvg")
    with pytest.raises(ConfigError, match=r"'flex' at 'flexperts\.methods\.fedavg:FedAvg': the name belongs to"):
        registry.method_names()
    assert registry._METHODS["flex"] == "flexperts.methods.flex:Flex"


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("not_there:Method", "cannot be imported"),
        ("flexperts.methods.fedavg:NotThere", "cannot be imported"),
        ("flexperts.methods.fedavg", "cannot be imported"),
        (":FedAvg", "cannot be imported"),
        ("flexperts.methods.kit.server_state:Server", "must be a subclass of flexperts.Method"),
        ("flexperts.methods.registry:make_method", "must be a subclass of flexperts.Method"),
    ],
)
def test_a_method_that_is_none_is_refused_when_it_is_used(place: str, rule: str) -> None:
    registry.register_method("theirs", place)
    with pytest.raises(ConfigError, match=rule):
        registry.method_class("theirs")


def test_a_class_that_is_no_method_is_not_registered() -> None:
    with pytest.raises(ConfigError, match="subclass"):
        registry.register_method("theirs", dict)  # type: ignore[arg-type]
    assert "theirs" not in registry.method_names()
