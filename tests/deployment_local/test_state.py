"""A state folder is private, and no run's name leads out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.deployment.listening import is_served, listening
from flexperts.deployment.state import check_private, delete_run, make_private, private_folder, run_ids, socket_of
from flexperts.errors import ArtifactError, ConfigError, FederationError, FlexpertsError

from .asking import BAD_RUNS, RUN


@pytest.mark.parametrize("run", BAD_RUNS)
def test_a_run_that_is_no_id_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(FederationError, match="32 digits"):
        private_folder(tmp_path, run)
    with pytest.raises(FlexpertsError):
        delete_run(tmp_path, run)


@given(st.text(max_size=40) | st.text("0123456789abcdef/.", min_size=30, max_size=34))
def test_no_run_leads_out_of_the_folder(run: str) -> None:
    try:
        folder = private_folder(Path("/state"), run)
    except FederationError:
        return
    assert folder.parent == Path("/state/runs")
    assert folder.name == run
    assert folder.resolve().parent == Path("/state/runs")


def test_a_new_state_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    make_private(state)
    assert state.stat().st_mode & 0o777 == 0o700
    make_private(state)
    with listening(state):
        assert socket_of(state).stat().st_mode & 0o777 == 0o600
    assert not socket_of(state).exists()


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o755, 0o740])
def test_a_state_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    with pytest.raises(ArtifactError, match=f"chmod 700 {state}"), listening(state):
        pass
    assert not any(state.iterdir())


def test_a_file_in_the_place_of_the_state_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    with pytest.raises(ArtifactError, match="choose another state folder"):
        make_private(tmp_path / "state")


def test_the_path_of_a_socket_has_an_end(tmp_path: Path) -> None:
    room = 107 - len(str(tmp_path)) - len("//worker.sock")
    longest = tmp_path / ("s" * room)
    assert len(str(socket_of(longest))) == 107
    with listening(longest):
        assert is_served(longest)
    with pytest.raises(ConfigError, match="shorter path"):
        check_private(tmp_path / ("s" * (room + 1)))


def test_forgetting_takes_one_run_and_leaves_the_others(tmp_path: Path) -> None:
    other = "f" * 32
    for run in (RUN, other, "notes"):
        (tmp_path / "runs" / run / "personal").mkdir(parents=True)
    assert run_ids(tmp_path) == sorted([RUN, other])
    delete_run(tmp_path, RUN)
    assert run_ids(tmp_path) == [other]
    with pytest.raises(ArtifactError, match="has no such run"):
        delete_run(tmp_path, RUN)
