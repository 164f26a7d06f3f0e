"""The examples run, on the tiny base."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from flexperts.communication.messages import encode
from flexperts.errors import PrivacyError

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
ONE_ROUND = EXAMPLES[0].with_name("one_round.py")
OTHERWISE = (ONE_ROUND, EXAMPLES[0].with_name("several_cards.py"))  # the second in federation/
SMALL = (
    "model.dtype=float32",
    "model.precision=fp32",
    "data.silos.train_rows=8",
    "data.silos.test_rows=4",
    "federation.rounds=1",
    "evaluation.max_new_tokens=4",
    "training.max_length=640",
)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e not in OTHERWISE], ids=lambda p: p.stem)
def test_example_runs(example: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example))["main"](tmp_path / "run", f"model.base={tiny_base}", *SMALL)
    printed = capsys.readouterr().out
    assert "zero_shot" in printed
    assert "global" in printed


def test_there_are_examples_and_the_quick_start_is_short() -> None:
    assert {"quickstart", "add_a_method", "one_round"} <= {p.stem for p in EXAMPLES}
    assert len((EXAMPLES[0].parent / "quickstart.py").read_text().splitlines()) < 40


def test_one_round_personalizes_both_silos_and_sends_nothing_personal(capsys: pytest.CaptureFixture[str]) -> None:
    silos = runpy.run_path(str(ONE_ROUND))["main"]()
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["silo", "untouched", "global", "personalized", "sent", "personal"]
    table = {name: [float(cell) for cell in cells] for name, *cells in map(str.split, lines)}
    assert list(table) == [silo.name for silo in silos] == ["help_desk", "shop"]

    for silo in silos:
        untouched, averaged, personalized, sent, personal = table[silo.name]
        assert personalized < averaged < untouched
        assert sent >= 4 * sum(p.numel() for p in silo.split.shared.values())  # fp32
        assert personal == 0
        with pytest.raises(PrivacyError, match="not in the shared group"):
            encode(silo.split, silo.split.personal)

    ours, theirs = (silo.split for silo in silos)
    assert ours.shared.keys() == theirs.shared.keys()
    assert all(torch.equal(ours.shared[name], theirs.shared[name]) for name in ours.shared)
    assert all(p.any() for p in ours.shared.values())  # LoRA's B starts at zero
    # The silos may graft different experts, but the names are the same.
    assert ours.personal.keys() == theirs.personal.keys()
    assert not any(torch.equal(ours.personal[name], theirs.personal[name]) for name in ours.personal)
