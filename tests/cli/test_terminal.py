"""What commands print in any terminal: texts as they are, and no traceback for want of letters or readers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from flexperts.cli.main import main
from flexperts.parameters.split import ParameterSplit
from flexperts.recipe import shipped_recipes
from flexperts.terminal.console import console
from flexperts.terminal.display import RunDisplay, score_table, split_table

SOURCE = Path(__file__).parents[2] / "src" / "flexperts"
LIKE_MARKUP = [
    "out [u]",
    "[/]",
    "[bold]x",
    ":smile:",
    "[link=a]b",
    "[red]",
    "\\[x]",
    "[/bold] [[u]]",
    "[@a]",
]
RECIPE = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[training]
local_steps = 1
[federation]
rounds = 1
[evaluation]
max_new_tokens = 2
rows = 2
[data.clients."{name}"]
train = "a.jsonl"
[data.clients."北京"]
train = "a.jsonl"
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("LC_ALL", "LANG", "PYTHONIOENCODING", "PYTHONUTF8")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}


def start(*arguments: str | bytes | Path, **variables: str) -> tuple[int, bytes, bytes]:
    """Run the command as users do."""
    command = [sys.executable, "-m", "flexperts", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env=environment(**variables))
    return done.returncode, done.stdout, done.stderr


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


# Markup


def test_there_is_one_console() -> None:
    """A console of rich's own would take names and paths for markup, and lose what stands in brackets."""
    made = [p for p in SOURCE.rglob("*.py") if "Console(" in p.read_text(encoding="utf-8")]
    assert made == [SOURCE / "terminal" / "console.py"]
    columns = [p for p in SOURCE.rglob("*.py") if "TextColumn(" in p.read_text(encoding="utf-8")]
    assert all(p.read_text().count("TextColumn(") == p.read_text().count("markup=False)") for p in columns)


@pytest.mark.parametrize("text", LIKE_MARKUP)
def test_texts_come_out_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(io.StringIO()) as out, RunDisplay(console()) as display:
        display.stage(f"stage {text}.")
        display.notice(f"notice {text}.")
        display.refused(f"client {text}", f"reason {text}.")
        display.progress(f"task {text}", 1, 2)
        display.chosen(f"chooser {text}", {"layer": [1, 2]})
        display.round({"clients": {}, "missing": [f"missing {text}"], "unscored": []})
    for words in ("stage", "notice", "client", "reason", "chooser", "missing"):
        assert f"{words} {text}" in out.getvalue()


@pytest.mark.parametrize("text", LIKE_MARKUP)
def test_a_progress_bar_shows_its_task_as_it_is(text: str) -> None:
    terminal = console()
    display = RunDisplay(terminal)
    display.progress(f"task {text}", 1, 2)
    with terminal.capture() as shown:
        terminal.print(display)
    assert f"task {text} " in shown.get()


@pytest.mark.parametrize("text", [*LIKE_MARKUP, "x" * 200])
def test_a_clients_name_is_whole_in_a_table(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {"zero_shot": 1.0, "global": None, "personalized": 2.0}
    summary = {"method": text, "clients": {text: {"rouge_l": state, "nll": state}}}
    monkeypatch.setenv("COLUMNS", "120")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        console().print(score_table(summary | {"mean": {"rouge_l": state, "nll": state}}))
    rows = [line.split("│")[1].strip() for line in out.getvalue().splitlines() if line.startswith("│")]
    assert "".join(rows).removesuffix("mean") == text


@pytest.mark.parametrize("text", LIKE_MARKUP)
def test_a_path_in_a_refusal_is_whole(text: str, tmp_path: Path) -> None:
    for command in (("report",), ("evaluate",), ("generate", "Q", "--client", "a"), ("forget", "a"), ("serve",)):
        code, _, said = call(command[0], tmp_path / text, *command[1:])
        assert code == 2
        assert said.startswith(f"error: {tmp_path / text}: it holds no run")
    assert call("run", f"{text}.toml")[2].startswith(f"error: {text}.toml: there is no such recipe")


# A run whose names hold all of it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished run in a folder like markup, of clients whose names are no ASCII; one is given in NFD."""
    work = tmp_path_factory.mktemp("terminal")
    rows = [json.dumps({"instruction": f"问题 {i}?", "response": "“中国” – да"}) for i in range(10)]
    (work / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = RECIPE.format(base=tiny_base, name=unicodedata.normalize("NFD", "Zürich"))
    (work / "r [u].toml").write_text(recipe, encoding="utf-8")
    out = work / "out [u] :smile:"
    code, printed, said = call("run", work / "r [u].toml", "--out", out)
    assert (code, said) == (0, "")
    assert printed.rstrip().endswith(f"everything is in {out}")
    assert "│ Zürich │" in printed
    return out


def test_files_and_records_have_the_name_in_nfc(finished: Path) -> None:
    assert (finished / "personal" / "Zürich.safetensors").exists()
    assert set(json.loads((finished / "summary.json").read_text())["clients"]) == {"Zürich", "北京"}


def test_a_report_names_its_folder(finished: Path) -> None:
    code, printed, said = call("report", finished)
    assert (code, said) == (0, "")
    assert f"everything is in {finished}: report.html" in printed


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_client_is_found_however_its_name_is_typed(finished: Path, form: str) -> None:
    name = unicodedata.normalize(form, "Zürich")
    assert call("generate", finished, "Was?", "--client", name)[0] == 0
    code, _, said = call("generate", finished, "Was?", "--client", f"{name}x")
    assert (code, said) == (2, "error: client 'Zürichx': the run's clients are Zürich, 北京; choose one\n")


# Letters that a terminal lacks

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.faults
@pytest.mark.parametrize("variables", [ENCODINGS[0], ENCODINGS[3]], ids=lambda v: next(iter(v.values())))
def test_a_table_of_names_in_another_encoding(finished: Path, variables: dict[str, str]) -> None:
    code, printed, said = start("evaluate", finished, **variables)
    assert (code, said) == (0, b"")
    assert b"\\u5317\\u4eac" in printed  # 北京
    assert b"\\u" not in printed.replace(b"\\u5317\\u4eac", b"")  # frames are of ASCII


@pytest.mark.faults
@pytest.mark.parametrize("variables", ENCODINGS, ids=lambda v: next(iter(v.values())))
def test_pages_of_help_in_another_encoding(variables: dict[str, str]) -> None:
    for command in (("--help",), ("methods",), ("run", "--help")):
        code, printed, said = start(*command, **variables)
        assert (code, said) == (0, b"")
        assert printed


@pytest.mark.faults
def test_an_answer_in_another_encoding(finished: Path) -> None:
    """The base is untrained: its answer is replaced by one that no terminal but UTF-8 has."""
    program = (
        "import sys; from flexperts.finished.trained import TrainedRun;"
        "from flexperts.evaluation.generation import Answer;"
        "TrainedRun.generate = lambda *a, **k: Answer('中国');"
        f"sys.argv = ['flexperts', 'generate', {str(finished)!r}, 'Q', '--client', 'Z\\xfcrich'];"
        "from flexperts.cli.main import main; main()"
    )
    for encoding, answer in (("latin-1", b"\\u4e2d\\u56fd"), ("utf-8", "中国".encode())):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, check=False, env=environment(PYTHONIOENCODING=encoding))
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, answer, b"")


@pytest.mark.parametrize("variables", ENCODINGS[:3], ids=lambda v: next(iter(v.values())))
def test_a_refusal_in_another_encoding(variables: dict[str, str]) -> None:
    code, printed, said = start("run", "北京.toml", **variables)
    assert (code, printed) == (2, b"")
    ships = ", ".join(shipped_recipes())
    there = f"give a TOML or YAML file, or the name of a recipe that ships: {ships}"
    assert said == f"error: \\u5317\\u4eac.toml: there is no such recipe; {there}\n".encode()


# Bytes that are no text


@pytest.mark.parametrize(
    "arguments",
    [
        [b"run", b"x\xff.toml"],
        [b"report", b"caf\xe9"],
        [b"generate", b"runs/a", b"Q", b"--client", b"Z\xfcrich"],
        [b"generate", b"runs/a", b"\xffWhat?", b"--client", b"a"],
        [b"run", b"r.toml", b"--out", b"\x80"],
        [b"run", b"r.toml", b"--set", b"model.base=\xfe"],
        [b"inspect", b"\xc3\x28"],
        [b"forget", b"a", b"--", b"\xed\xa0\x80"],
        [b"silo", b"check", b"\xf0\x9f.toml"],
    ],
)
def test_bytes_that_are_no_text_are_refused_in_one_line(arguments: list[bytes]) -> None:
    code, printed, said = start(*arguments, LC_ALL="C.UTF-8")
    assert (code, printed) == (2, b"")
    assert said.count(b"\n") == 1
    assert said.startswith(b"error: argument '")
    assert b"\\x" in said.split(b":")[1]
    assert b"it holds bytes that are not UTF-8 text" in said


@pytest.mark.faults
@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_names_are_utf_8_in_any_locale(finished: Path, locale: str) -> None:
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert start("forget", finished, "Zürich", **plain)[2].endswith(
        b"use `flexperts forget` on a run that was stopped before its end\n"
    )
    code, printed, said = start("join", finished, "--data", "a.csv", "--name", "Zürich", **plain)
    assert (code, printed.strip()) == (2, b"")
    assert said.startswith(b"error: client 'Z\\xfcrich': ")  # it is found, and its files are


def test_a_group_without_parameters_is_neither_trained_nor_sent() -> None:
    table = split_table("fedavg", ParameterSplit({"a": Parameter(torch.ones(2))}, {}, {}).describe())
    rows = [*zip(*(column.cells for column in table.columns), strict=True)]
    assert rows == [
        ("shared", "1", "2", "8 B", "yes", "to the server, every round"),
        ("personal", "0", "0", "0 B", "-", "-"),
        ("frozen", "0", "0", "0 B", "-", "-"),
    ]


def test_rows_in_a_folder_whose_name_is_no_text(tmp_path: Path, tiny_base: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir()
    recipe = Path(os.fsdecode(folder + b"/r.toml"))
    recipe.write_text(RECIPE.format(base=tiny_base, name="a"), encoding="utf-8")
    command = [sys.executable, "-m", "flexperts", "run", "r.toml", "--out", "o"]
    done = subprocess.run(command, capture_output=True, check=False, env=environment(LC_ALL="C.UTF-8"), cwd=folder)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"rename that folder or file" in done.stderr
    assert not recipe.with_name("o").exists()


# Readers that are gone


@pytest.mark.faults
@pytest.mark.parametrize("command", [["methods"], ["methods", "--markdown"], ["--help"], ["run", "x.toml"]])
def test_a_reader_that_hangs_up_sees_no_traceback(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "flexperts", *command],
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_error(closed: str) -> None:
    for command, code in (("methods", 0), ("run x.toml", 2)):
        line = f"{sys.executable} -m flexperts {command} {closed}"
        done = subprocess.run(line, shell=True, capture_output=True, check=False, env=environment())
        assert done.returncode == code
        assert b"Traceback" not in done.stderr


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert call("methods") == (
        2,
        "",
        "error: the home folder: this user has none, and libraries keep settings and caches there; set HOME to a "
        "folder that you can write to\n",
    )
