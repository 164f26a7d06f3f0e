"""`flexperts data check`, the short line of `run`, `join --columns` and `flexperts new`, as users call them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest

from flexperts.cli.main import main
from flexperts.data.silos.generate import generate_silo
from flexperts.serving.contract import ModelName
from flexperts.serving.engine.engine import ServingEngine, open_engine

HEAD = """
[model]
base = "{base}"
dtype = "float32"
precision = "fp32"
[training]
max_length = 640
local_steps = 1
[federation]
rounds = 1
[evaluation]
max_new_tokens = 40
rows = 2
"""
CLIENTS = """
[data.clients.clinic]
train = "clinic.csv"
columns = {instruction = "frage", context = "notiz", response = "antwort"}
[data.clients.help_desk]
train = "help_desk.jsonl"
"""
PRIVATE = "zebra-crossing-7731"
"""A word in every row; a message must not have it."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(*arguments: str | Path, terminal: bool = False) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["flexperts", *map(str, arguments)])
        patch.setenv("COLUMNS", "160")
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def silo_rows(silo: str, count: int = 10) -> list[dict[str, str]]:
    rows = generate_silo(silo, 0, count)["train"]
    return [{**row, "response": f"{row['response']} {PRIVATE}"} for row in rows]  # type: ignore[dict-item]


@pytest.fixture
def work(tmp_path: Path, byte_base: Path) -> Path:
    """A recipe of two silos with other headers and formats."""
    with (tmp_path / "clinic.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["frage", "notiz", "antwort", "id"])
        for number, row in enumerate(silo_rows("clinic")):
            table.writerow([row["instruction"], row["context"], row["response"], number])
    lines = [json.dumps({k: v for k, v in row.items() if k != "passage"}) for row in silo_rows("help_desk")]
    (tmp_path / "help_desk.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.toml").write_text(HEAD.format(base=byte_base) + CLIENTS)
    return tmp_path


def test_everything_about_a_recipe_as_json(work: Path) -> None:
    code, printed, said = call("data", "check", work / "recipe.toml", "--json")
    assert (code, said) == (0, "")
    found = json.loads(printed)
    assert (found["kind"], found["max_length"], found["max_new_tokens"], found["errors"]) == ("recipe", 640, 40, [])
    assert [(f["silo"], f["split"], f["unused"]) for f in found["files"]] == [
        ("clinic", "train", ["id"]),
        ("help_desk", "train", []),
    ]
    assert found["files"][0]["columns"] == {"instruction": "frage", "context": "notiz", "response": "antwort"}
    silo = found["silos"]["clinic"]
    assert sum(silo["rows"].values()) == 10
    assert silo["template"] == "chat"
    assert 0 < silo["tokens"]["p50"] <= silo["tokens"]["p95"] <= silo["tokens"]["max"] <= 640
    assert silo["scripts"] == {"Latin": 1.0}
    answers = [len(row["response"].encode()) for row in silo_rows("clinic")]
    assert sum(silo["longer"].values()) == sum(length > 40 for length in answers)
    assert silo["answer_tokens"]["max"] == max(answers)  # a byte is a token
    assert set(found["difference"]) == {"clinic", "help_desk"}
    assert found["difference"]["clinic"]["labels"] == 1.0  # only one of the two has categories
    assert PRIVATE not in printed


def test_the_table_and_the_example_of_a_terminal(work: Path) -> None:
    code, printed, _ = call("data", "check", work / "recipe.toml", terminal=True)
    assert code == 0
    trained = re.findall(r"\x1b\[1;4;32m(.*?)\x1b\[0m", printed, re.DOTALL)
    assert len(trained) == 2
    assert all(PRIVATE in text and "<|user|>" not in text for text in trained)
    assert re.search(r"\x1b\[2m<\|user\|>", printed)
    assert "unused columns: 'id'" in printed

    for options, terminal in ((["--no-example"], True), ([], False), (["--json"], True)):
        _, printed, _ = call("data", "check", work / "recipe.toml", *options, terminal=terminal)
        assert PRIVATE not in printed
        assert "help_desk" in printed


def test_the_example_of_a_pair_has_both_answers(work: Path) -> None:
    rows = [{"prompt": f"Is {i} odd?", "chosen": "Certainly.", "rejected": "No."} for i in range(10)]
    (work / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--recipe", work / "recipe.toml", "--set", "training.objective=dpo")
    code, printed, _ = call("data", "check", work / "pairs.jsonl", *options, terminal=True)
    assert code == 0
    assert "\x1b[1;4;32mCertainly.</s>\x1b[0m" in printed
    assert "\x1b[1;4;31mNo.</s>\x1b[0m" in printed
    found = json.loads(call("data", "check", work / "pairs.jsonl", *options, "--json")[1])
    assert found["files"][0]["format"] == "preference"
    assert found["silos"]["pairs"]["answer_tokens"]["max"] == len("Certainly.")


def test_control_characters_of_rows_are_shown_as_escapes(work: Path) -> None:
    rows = [{"instruction": f"q{i}\x1b[31m\u202e", "response": "a\x07\nb"} for i in range(10)]
    (work / "help_desk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, printed, _ = call("data", "check", work / "help_desk.jsonl", "--recipe", work / "recipe.toml", terminal=True)
    assert "\\x1b[31m\\u202e" in printed
    assert "a\\x07\x1b[0m\n" in printed
    assert "\u202e" not in printed


def test_errors_of_all_silos_are_printed_and_the_code_is_2(work: Path) -> None:
    (work / "clinic.csv").write_text("frage,notiz\nq,n\n")
    with (work / "help_desk.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": PRIVATE, "response": ""}) + "\n")
    code, printed, said = call("data", "check", work / "recipe.toml")
    assert code == 2
    first, second = said.splitlines()
    assert first.startswith("error: clinic: ")
    assert "no column 'antwort'" in first
    assert second.startswith("error: help_desk: ")
    assert PRIVATE not in printed + said
    assert call("run", work / "recipe.toml", "--out", work / "run")[0] == 2

    code, printed, said = call("data", "check", work / "recipe.toml", "--json", "--set", "data.on_bad_row=drop")
    found = json.loads(printed)
    assert code == 2
    assert [error["kind"] for error in found["errors"]] == ["DataError"]
    assert set(found["silos"]) == {"help_desk"}
    assert any("1 of 11 rows are left out" in note for note in found["notes"])


@pytest.mark.parametrize(
    "override",
    [
        "method.name=none",
        "model.base=/nowhere",
        "training.max_length=64",
        "training.max_length=2000",
        "evaluation.max_new_tokens=1000",
        "method.name=fedlease",
    ],
)
def test_it_refuses_what_a_run_refuses(work: Path, override: str) -> None:
    checked, _, why = call("data", "check", work / "recipe.toml", "--set", override)
    ran, _, said = call("run", work / "recipe.toml", "--out", work / "run", "--set", override)
    assert checked == ran == 2
    assert said.splitlines()[-1] in why.splitlines()  # a run stops at the first error


def test_one_file_of_rows(work: Path) -> None:
    columns = ["--columns", "instruction=frage", "--columns", "response=antwort"]
    options = ["--recipe", work / "recipe.toml", "--set", "training.max_length=800"]
    code, printed, _ = call("data", "check", work / "clinic.csv", *columns, *options, "--json")
    found = json.loads(printed)
    assert code == 0
    assert (found["kind"], found["max_length"], found["difference"]) == ("file", 800, {})
    assert found["files"][0]["columns"] == {"instruction": "frage", "response": "antwort"}
    assert list(found["silos"]) == ["clinic"]
    code, _, said = call("data", "check", work / "help_desk.jsonl", "--columns", "frage=x", *options)
    assert code == 2
    assert "columns maps ['frage']" in said
    code, _, said = call("data", "check", work / "help_desk.jsonl", "--columns", "frage")
    assert (code, "FIELD=COLUMN" in said) == (2, True)
    code, _, said = call("data", "check", work / "recipe.toml", *columns)
    assert (code, "names its own files" in said) == (2, True)
    code, _, said = call("data", "check", work / "none.txt")
    assert (code, "no such recipe or silo file" in said) == (2, True)


def test_a_silo_file_and_silo_check_agree(work: Path, tiny_base: Path) -> None:
    (work / "silo.toml").write_text(
        f'name = "clinic"\nstate = "state"\nbase = "{tiny_base}"\n[data]\ntrain = "clinic.csv"\n'
        'columns = {instruction = "frage", response = "antwort"}\n'
    )
    code, printed, _ = call("data", "check", work / "silo.toml", "--json", "--recipe", work / "recipe.toml")
    assert code == 0
    found = json.loads(printed)
    assert (found["kind"], list(found["silos"])) == ("silo", ["clinic"])
    rows = found["silos"]["clinic"]["rows"]
    code, printed, _ = call("silo", "check", work / "silo.toml", terminal=True)
    assert code == 0
    assert f"clinic: {rows['train']} train rows, {rows['test']} test rows; all fit 512 tokens" in printed
    assert PRIVATE not in printed


def decoded(engine: ServingEngine, tokens: list[int]) -> str:
    return str(engine._encoder.tokenizer.decode(tokens))


def test_a_run_starts_with_the_short_version_and_a_silo_joins_with_its_columns(work: Path) -> None:
    short = ("--set", "evaluation.max_new_tokens=2")
    code, printed, _ = call("run", work / "recipe.toml", "--out", work / "run", *short)
    assert code == 0
    assert re.search(r"tokens of a row: \d+ \(p50\), \d+ \(p95\), \d+ \(max\), of at most 640", printed)
    with (work / "ward.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Q", "A"])
        table.writerows([f"question {number}", f"answer {number}"] for number in range(10))
    given = ["--data", work / "ward.csv", "--columns", "instruction=Q", "--columns", "response=A"]
    options = ["--set", "data.test_fraction=0.5", "--set", "model.template=alpaca"]
    code, _, said = call("join", work / "run", *given, *options)
    assert (code, said) == (0, "")
    record = json.loads((work / "run" / "joined" / "ward.json").read_text())
    assert record["data"] == {
        "train": "../ward.csv",
        "test": None,
        "columns": {"instruction": "Q", "response": "A"},
        "test_fraction": 0.5,
        "template": "alpaca",
    }
    assert record["rows"]["test_rows"] == 5
    with contextlib.closing(open_engine(work / "run")) as engine:
        asked = [{"role": "user", "content": "Hello"}]
        prompts = {
            name: decoded(engine, engine.prompt_tokens(asked, ModelName(name, "personalized")))
            for name in ("ward", "clinic")
        }
    assert prompts["clinic"] == "<|user|>Hello\n<|assistant|>"
    assert prompts["ward"].endswith("### Instruction:\nHello\n\n### Response:\n")
    assert call("generate", work / "run", "Hello", "--client", "ward", "--max-tokens", "2")[0] == 0
    code, _, said = call("evaluate", work / "run")
    assert (code, said) == (0, "")
    code, _, said = call("evaluate", work / "run", "--data", f"ward={work / 'ward.csv'}")
    assert (code, said) == (0, "")
    code, _, said = call("evaluate", work / "run", "--data", f"clinic={work / 'clinic.csv'}")
    assert (code, said) == (0, "")


def test_new_writes_files_that_run_as_they_are(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "start"
    code, printed, said = call("new", folder)
    assert (code, said) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == [
        "clinic.jsonl",
        "help_desk.csv",
        "recipe.toml",
        "silo.toml",
    ]
    assert f"flexperts data check {folder / 'recipe.toml'}" in printed
    code, _, said = call("new", folder)
    assert (code, "is not overwritten" in said) == (2, True)

    tiny = [f"model.base={tiny_base}", "model.dtype=float32", "model.precision=fp32", "training.max_length=800"]
    tiny = [word for one in tiny for word in ("--set", one)]
    code, printed, said = call("data", "check", folder / "recipe.toml", "--json", *tiny)
    assert (code, said) == (0, "")
    found = json.loads(printed)
    assert [sum(silo["rows"].values()) for silo in found["silos"].values()] == [32, 32]
    assert [file["unused"] for file in found["files"]] == [[], []]
    assert not any("left out" in note for note in found["notes"])
    less = ["--set", "training.local_steps=1", "--set", "evaluation.rows=2", "--set", "evaluation.max_new_tokens=2"]
    code, _, said = call("run", folder / "recipe.toml", "--out", tmp_path / "run", *tiny, *less)
    assert (code, said) == (0, "")

    silo = folder / "silo.toml"
    silo.write_text(silo.read_text().replace("smol-moe", str(tiny_base)))
    code, printed, said = call("silo", "check", silo)
    assert (code, said) == (0, "")
    assert "clinic: " in printed
    assert "at least 5 rows" in printed or "min_score_rows" in printed
