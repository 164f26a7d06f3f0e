"""A run and a silo's state are copied, deleted and restored elsewhere as docs/operating.md says, and go on."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation

from ..attacks.asked_silo import RUN, AskedSilo, moved, silo_file, to_evaluate, to_train  # noqa: TID252
from ..attacks.test_silo_ledger import ONCE, counted  # noqa: TID252
from ..federation.test_resume import AfterRound, break_off, left_behind  # noqa: TID252

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
SAVE_RUN, RESTORE_RUN, SAVE_STATE, RESTORE_STATE = re.findall("^tar .*$", PAGE, re.MULTILINE)
PLACES = {"runs": "/srv/flexperts/runs", "restored": "/srv/restored/runs", "silo": "/var/lib/flexperts"}
Recipe = Callable[..., RunConfig]


def do(command: str, **places: Path) -> None:
    """Run a command of the page, with folders of this test in place of its folders."""
    for name, place in places.items():
        assert PLACES[name] in command
        command = command.replace(PLACES[name], str(place))
    subprocess.run(["sh", "-c", command], cwd=places.popitem()[1].parent, check=True)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mode for path in folder.rglob("*")}


def test_a_run_that_is_restored_elsewhere_ends_as_one_that_never_moved(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe("evaluation.max_new_tokens=2", "evaluation.rows=2", "lora.dropout=0.1")
    run_federation(config, tmp_path / "whole")
    runs, restored = tmp_path / "runs", tmp_path / "restored"
    break_off(config, runs / "flu-season", AfterRound(1))
    before, ours = modes(runs), left_behind(runs)
    do(SAVE_RUN, runs=runs)
    shutil.rmtree(runs)
    restored.mkdir()
    do(RESTORE_RUN, restored=restored)
    assert (modes(restored), left_behind(restored)) == (before, ours)
    run_federation(config, (restored / "flu-season").rename(restored / "renamed"), resume=True)
    assert left_behind(restored / "renamed") == left_behind(tmp_path / "whole")


def test_a_silo_that_is_restored_elsewhere_answers_as_one_that_never_moved(
    recipe: Recipe, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "stays").mkdir()
    (tmp_path / "moves").mkdir()
    stays, moves = (AskedSilo(silo_file(tmp_path / name, tiny_base), recipe) for name in ("stays", "moves"))
    text = stays.handed()
    start = stays.start(text)
    assert moves.start(text).vector.tobytes() == start.vector.tobytes()
    first, scored = to_train(start), to_evaluate(start)
    expected = [stays.raw(kind, content, text) for kind, content in (("train", first), ("evaluate", scored))]
    assert [
        moves.raw(kind, content, text) for kind, content in (("train", first), ("evaluate", scored))
    ] == expected

    silo = tmp_path / "silo"
    silo.mkdir()
    moves.state.rename(silo / "worker")
    before = modes(silo)
    do(SAVE_STATE, silo=silo)
    shutil.rmtree(silo)
    silo.mkdir()
    do(RESTORE_STATE, silo=silo)
    assert modes(silo) == before
    moves.file.write_text(moves.file.read_text().replace('state = "state"', f'state = "{silo}/worker"'))
    moves.state = silo / "worker"
    moves.restart()

    assert moves.raw("train", first, text) == expected[0]  # sent again, not computed again
    assert moves.refusal("train", to_train(moved(start, 1.0)), text) == ONCE
    second = to_train(moved(start, 0.01), 2)
    assert moves.raw("train", second, text) == stays.raw("train", second, text)
    personal = f"runs/{RUN}/personal/clinic.safetensors"
    assert moves.files()[personal] == stays.files()[personal]
    assert counted(moves) == counted(stays)
