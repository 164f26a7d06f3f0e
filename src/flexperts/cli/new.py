"""`flexperts new`: a folder to start from, with a recipe, sample rows and a silo's file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated

import typer

RECIPE = """\
# Two silos and a model for each. Check the rows, then run:
#   flexperts data check recipe.toml
#   flexperts run recipe.toml --out runs/first
# Every setting has a default; docs/settings.md lists them all.
seed = 0                            # decides everything that is drawn, and so the result

[model]
base = "smol-moe"                   # ships with flexperts; or a hub id or folder of any supported MoE

# One section per silo. Paths are relative to this file; replace these two with your own.
[data.clients.clinic]
train = "clinic.jsonl"              # columns instruction, context, response, category: found by their names
                                    # test = "clinic-test.jsonl" if you have one; else see test_fraction

[data.clients.help_desk]
train = "help_desk.csv"
on_bad_row = "drop"                 # rows that cannot be used are left out, and named; default: refuse
[data.clients.help_desk.columns]    # its file has other headers
instruction = "question"
context = "message"
response = "answer"
category = "kind"

[data]
test_fraction = 0.25                # share of passages held out to score on, where a silo has no test file

[method]
name = "flex"                       # `flexperts methods` lists all
reference = "fedavg"                # runs afterwards on the same rows, for comparison

[training]
batch_size = 2
lr = 2e-3                           # of the shared LoRA
personal_lr = 6e-3                  # of the personal experts and their gates
max_length = 512                    # longest row in tokens; contexts are cut to fit

[federation]
rounds = 2

[evaluation]
max_new_tokens = 32                 # longest generated answer
"""
SILO = """\
# A silo on its own machine, in a run of several machines; see docs/deploy.md.
#   flexperts silo check silo.toml
#   flexperts silo serve silo.toml
name = "clinic"                     # the only entry of this file that is ever sent
base = "smol-moe"                   # where this machine has the recipe's base
state = "state"                     # private folder for what is kept between rounds

[data]
train = "clinic.jsonl"
# columns = {instruction = "question", response = "answer"}    # where your headers differ

[policy]
min_score_rows = 5                  # no score of fewer rows leaves this machine
"""
_ROWS = 32
_HEADERS = {"instruction": "question", "context": "message", "response": "answer", "category": "kind"}


def command(folder: Annotated[Path, typer.Argument(help="Folder to make.")]) -> None:
    """Make a folder to start from: a commented recipe, rows of two example silos, and a silo's file."""
    from flexperts.errors import ArtifactError
    from flexperts.files import write_text

    texts = {"recipe.toml": RECIPE, "silo.toml": SILO, "clinic.jsonl": _json_lines(), "help_desk.csv": _csv()}
    if there := [name for name in texts if (folder / name).exists()]:
        raise ArtifactError(f"{folder / there[0]}", "it exists and is not overwritten", "choose another folder")
    for name, text in texts.items():
        write_text(folder / name, text)
        typer.echo(folder / name)
    typer.echo(f"now: flexperts data check {folder / 'recipe.toml'}")


def _json_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in _rows("clinic"))


def _csv() -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_HEADERS.values())
    table.writerows([row[field] for field in _HEADERS] for row in _rows("help_desk"))
    return text.getvalue()


def _rows(silo: str) -> list[dict[str, str]]:
    from flexperts.data.silos.generate import generate_silo

    rows = generate_silo(silo, 0, _ROWS)["train"]
    return [{field: str(value) for field, value in row.items() if field in _HEADERS} for row in rows]
