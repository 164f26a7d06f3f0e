"""What can be wrong with a deployed run before anything is sent, and where it may lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexperts.deployment.server_app import LogObserver, _open
from flexperts.deployment.settings import RUNS, run_folder
from flexperts.deployment.submit import APP, connection_of
from flexperts.errors import ArtifactError, ConfigError


def test_a_connection_is_one_of_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="has no connections"):
        connection_of("superlink://mine")
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "mine"\n[superlink.mine]\ninsecure = true\n')
    assert connection_of("superlink://mine") == "mine"
    with pytest.raises(ConfigError, match=r"has mine; add \[superlink.mien\]"):
        connection_of("superlink://mien")
    for engine in ("mine", "superlink://", "rays", ""):
        with pytest.raises(ConfigError, match="engines are in-process, ray and superlink://NAME"):
            connection_of(engine)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/x", "a/b", ".hidden", "a" * 101, "a\n", "-x", "ä"])
def test_a_runs_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="not a path"):
        run_folder(name)


def test_runs_lie_in_the_superlinks_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNS, raising=False)
    assert run_folder("flu-season") == Path("runs") / "flu-season"
    monkeypatch.setenv(RUNS, str(tmp_path))
    assert run_folder("a.b_c-1") == tmp_path / "a.b_c-1"


def test_nothing_is_resumed_or_overwritten_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no run to resume"):
        _open(tmp_path / "a", "seed = 1", resume=True)
    first = _open(tmp_path / "a", "seed = 1", resume=False)
    with pytest.raises(ArtifactError):
        _open(tmp_path / "a", "seed = 1", resume=False)
    assert _open(tmp_path / "a", "seed = 1", resume=True).run_id == first.run_id
    with pytest.raises(ArtifactError, match="another recipe"):
        _open(tmp_path / "a", "seed = 2", resume=True)


def test_the_app_that_travels_holds_no_weights_and_no_rows() -> None:
    names = sorted(p.name for p in APP.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert names == ["__init__.py", "client.py", "pyproject.toml", "server.py"]


def test_a_round_is_logged_with_the_losses_that_were_told(caplog: pytest.LogCaptureFixture) -> None:
    clients = {"a": {"loss": 1.23456, "steps": 2}, "b": {"steps": 2}}  # b's is hidden, as under local noise
    with caplog.at_level("INFO"):
        LogObserver().round({"number": 3, "clients": clients, "seconds": {"training": 4.0}})
    assert caplog.messages == ["round 3: {'a': 1.235, 'b': 'trained'}, training 4.0 s"]
