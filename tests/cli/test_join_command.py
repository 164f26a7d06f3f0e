"""`flexperts join` as users call it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexperts.cli.main import main
from flexperts.data.silos.generate import write_silos

RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[data]
folder = "silos"
[training]
max_length = 640
local_steps = 2
[federation]
rounds = 1
[evaluation]
max_new_tokens = 2
rows = 2
"""


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished run of three silos; the rows of the fourth lie beside it."""
    work = tmp_path_factory.mktemp("join")
    write_silos(work / "silos", 0, 8, 4)
    (work / "silos" / "shop").rename(work / "oncology")
    (work / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    code, _, said = call("run", work / "recipe.toml", "--out", work / "run")
    assert (code, said) == (0, "")
    return work / "run"


def test_a_silo_joins_and_is_asked_and_scored(run: Path) -> None:
    data = run.parent / "oncology"
    code, printed, said = call("join", run, "--data", data / "train.jsonl", "--test", data / "test.jsonl")
    assert (code, said) == (0, "")
    record = json.loads((run / "joined" / "oncology.json").read_text())
    mean = json.loads((run / "summary.json").read_text())["mean"]
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    for who, scores in (("oncology", record), ("mean of 3 participants", mean)):
        for state in ("zero_shot", "global", "personalized"):
            assert f"{scores['rouge_l'][state]:.1f} ({scores['nll'][state]:.2f})" in lines[who]
    assert "oncology is a client of" in printed
    assert "8 train rows, 2 steps" in printed

    code, printed, _ = call("evaluate", run)
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [("joined" in row) for row in rows] == ["oncology" in row for row in rows]
    assert f"({record['nll']['personalized']:.2f})" in next(row for row in rows if "oncology (joined)" in row)
    assert call("generate", run, "Summarise the note.", "--client", "oncology")[0] == 0

    code, _, said = call("join", run, "--data", data / "train.jsonl")
    assert code == 2
    assert said.startswith("error: client 'oncology':")
    assert "--name" in said


def test_what_is_wrong_is_said_in_one_line(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((run, "--data", tmp_path / "gone.jsonl"), "there is no such data file"),
        ((tmp_path, "--data", tmp_path / "x.jsonl"), "it holds no run"),
        ((run, "--data", run.parent / "oncology" / "train.jsonl", "--name", "y", "--steps", "0"), "steps = 0"),
        ((run, "--data", "x.jsonl", "--set", "graft.rank=2"), "--set graft.rank=2"),
    ):
        code, _, said = call("join", *arguments)
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
    assert sorted(p.stem for p in (run / "joined").glob("*")) in ([], ["oncology"])


def test_its_help_imports_nothing_heavy() -> None:
    code = """
import sys
from flexperts.cli.main import main
sys.argv = ["flexperts", "join", "--help"]
try:
    main()
except SystemExit as done:
    assert done.code == 0
print(*{"torch", "transformers", "flwr", "peft", "numpy", "pydantic"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--data" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
