"""The check of rows before a run, behind `data check` and `silo check`: what is found, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexperts.client.answer_limit import answer_limit, check_limit
from flexperts.client.floor import check_floor
from flexperts.client.workspace import Workspace
from flexperts.config.names import client_name, file_safe
from flexperts.config.run import RunConfig
from flexperts.data.check import differences, file_facts, parts, silo_facts
from flexperts.data.prompts import Example
from flexperts.data.records import ENDINGS, name_and_ending, names_shown
from flexperts.data.sources import HUB
from flexperts.deployment.settings import for_silo
from flexperts.engines.run import check_clients, check_settings
from flexperts.errors import ConfigError, FlexpertsError, printable
from flexperts.finished.beyond import check_beyond
from flexperts.finished.trained import with_rows_of
from flexperts.observer import Observer, Once, observing
from flexperts.recipe import client_files, holds_silo, load_recipe, load_silo, located, parse_recipe
from flexperts.terminal.console import console

Kind = Literal["recipe", "silo", "file"]
_EXAMPLES = 4
"""Most silos of which an example is shown."""
_SILOS = 40
"""Most silos in the table."""


@dataclass
class Checked:
    """What a check has found.

    Args:
        config: The run.
        workspace: Its rows, without those that are refused.
        notes: Notices, one line each.
        errors: What a run would refuse.
    """

    config: RunConfig
    workspace: Workspace
    notes: list[str]
    errors: list[FlexpertsError]

    def as_json(self) -> dict[str, Any]:
        """Return all facts as one JSON value; no row is in it."""
        work, config = self.workspace, self.config
        clients = self.clients
        limit = answer_limit(work, config) if clients else None
        files = list[dict[str, Any]]()
        with suppress(FlexpertsError):  # it is reported where the rows are read
            files = file_facts(config.data)
        return {
            "base": config.model.base,
            "max_length": config.training.max_length,
            "max_new_tokens": limit,
            "files": files,
            "silos": {
                name: {"template": "chat" if work.encoder_for(name).chat else "alpaca"}
                | silo_facts(rows, work.lengths[name], limit or 0)
                for name, rows in clients.items()
            },
            "difference": differences(clients, work.lengths) if len(clients) > 1 else {},
            "notes": self.notes,
            "errors": [
                {"kind": type(e).__name__, "value": e.value, "rule": e.rule, "remedy": e.remedy}
                for e in self.errors
            ],
        }

    @property
    def clients(self) -> dict[str, Any]:
        """The rows of the silos that a run would not refuse; none if the base's tokenizer cannot be loaded."""
        found: dict[str, Any] = self.workspace.__dict__.get("clients", {})
        return found


class _Notes(Observer):
    """Observer that keeps notices."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(text)


def caught(look: Callable[..., object], *arguments: object) -> list[FlexpertsError]:
    """Run a check and return its error, if any, so that the other checks still run."""
    try:
        look(*arguments)
    except FlexpertsError as error:
        return [error]
    return []


def raise_last(errors: Sequence[FlexpertsError]) -> None:
    """Print all errors but the last one, and raise that."""
    for error in errors[:-1]:
        typer.echo(f"error: {error}", err=True)
    if errors:
        raise errors[-1]


def planned_run(
    source: str,
    recipe: Path | None,
    settings: Iterable[str],
    *,
    test: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Kind, RunConfig]:
    """Return the run whose rows are checked.

    Args:
        source: A recipe, a file of rows, or a silo's file.
        recipe: The recipe of the planned run, for rows and silos.
        settings: Overrides of the recipe.
        test, columns: Test file and columns of a file of rows.
    """
    is_file = source.startswith(HUB) or name_and_ending(Path(source))[1] in ENDINGS
    if not is_file and (test is not None or columns is not None):
        option = "--test" if test is not None else "--columns"
        raise ConfigError(option, f"{source} names its own files", f"leave {option} out")
    if not is_file and not holds_silo(Path(source)):
        if recipe is not None:
            raise ConfigError(f"--recipe {recipe}", f"{source} is a recipe itself", "leave --recipe out")
        return "recipe", load_recipe(source, settings)
    planned = load_recipe(recipe, settings) if recipe else parse_recipe("[data]\nat_silos = true", settings)
    if not is_file:
        return "silo", for_silo(planned, load_silo(source))
    name = client_name(file_safe(_name(source)))
    own = planned.data.settings_of(name) | ({} if columns is None else {"columns": dict(columns)})
    files = {"train": located(source, Path()), "test": test and located(test, Path())}
    return "file", with_rows_of(planned, name, client_files(source, own | files))


def _name(source: str) -> str:
    """Return the name of a silo whose rows are in a file: the file's, or its folder's."""
    name = name_and_ending(Path(source.removeprefix(HUB)))[0]
    return Path(located(source, Path())).parent.name if name == "train" else name


def checked(config: RunConfig, *, whole: bool) -> Checked:
    """Read and encode the rows of all silos, and collect what a run would report or refuse.

    Args:
        config: The run.
        whole: Whether all silos of the run are in it, so that their number counts.
    """
    notes = _Notes()
    errors: list[FlexpertsError] = []
    work = Workspace(config, refused=errors.append)
    with observing(Once(notes)):
        errors += caught(check_settings, config)
        errors += caught(lambda: work.clients)
        if work.__dict__.get("clients") and not errors:
            if whole:
                errors += caught(check_clients, config, work.clients)
                errors += caught(check_beyond, config)
            errors += caught(check_floor, config, work.clients)
            errors += caught(check_limit, work, config, notes)
    return Checked(config, work, notes.lines, errors)


def print_report(found: Checked, kind: Kind, source: str, *, as_json: bool, example: bool) -> None:
    """Print what a check has found.

    Args:
        found: The result of ``checked``.
        kind: What ``source`` is.
        source: What was checked.
        as_json: Whether it is JSON; no row is in it.
        example: Whether a row of each silo may be shown; it is only shown on a terminal.
    """
    facts = {"source": source, "kind": kind, **found.as_json()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    out = console()
    for note in facts["notes"]:
        out.print(f"note: {printable(note)}", soft_wrap=True)
    for name, its in facts["silos"].items() if kind == "silo" else ():
        rows = f"{its['rows']['train']} train rows, {its['rows']['test']} test rows"
        out.print(f"{name}: {rows}; all fit {facts['max_length']} tokens", soft_wrap=True)
    if facts["silos"]:
        out.print(_table(facts))
    for line in _lines(facts):
        out.print(line, soft_wrap=True)
    if example and sys.stdout.isatty():
        for name in list(found.clients)[:_EXAMPLES]:
            _print_example(out, found.workspace, name)


def _table(facts: Mapping[str, Any]) -> Table:
    """Return the table of all silos' facts."""
    sides = [
        side for side in ("train", "test", "validation") if any(f["rows"][side] for f in facts["silos"].values())
    ]
    table = Table(title=f"rows, as {facts['base']} reads them", title_justify="left")
    table.add_column("silo", overflow="fold")
    for title in ("/".join(sides), "tokens", "answer", "cut", "long", "twice", "in train", "empty"):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("scripts", overflow="fold")
    table.add_column("differs", justify="right", overflow="fold")
    for name, its in list(facts["silos"].items())[:_SILOS]:
        counts = (its["cut"], sum(its["longer"].values()), sum(its["duplicates"].values()), its["also_in_train"])
        table.add_row(
            name,
            "/".join(str(its["rows"][side]) for side in sides),
            "/".join(map(str, its["tokens"].values())),
            "/".join(map(str, its["answer_tokens"].values())),
            *(str(count or "-") for count in (*counts, its["empty"])),
            " ".join(f"{script} {share:.0%}" for script, share in list(its["scripts"].items())[:3]),
            _difference(facts["difference"].get(name)),
        )
    if (more := len(facts["silos"]) - _SILOS) > 0:
        table.caption = f"and {more} more silos; --json has all of them"
    return table


def _difference(its: Mapping[str, Any] | None) -> str:
    if its is None:
        return "-"
    return "/".join("-" if value is None else f"{value:.2f}" for value in its.values())


def _lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what the table's columns mean, and what is read of the files."""
    legend = [
        f"tokens, answer: median/95th percentile/longest, of at most {facts['max_length']} tokens",
        "cut: contexts cut to fit",
        f"long: answers of more than {facts['max_new_tokens']} tokens, which no generated answer has",
        "twice: rows that repeat another row of their split; in train: test or validation rows that are in train",
        "empty: answers without a letter or digit",
    ]
    if facts["difference"]:
        legend.append(
            "differs: labels/tokens/answers against all other silos, 0 = same distribution, 1 = nothing in common"
        )
    used: dict[tuple[str, str], list[str]] = {}
    for file in facts["files"]:
        if "columns" in file:
            read = ", ".join(f"{field} = {printable(column)!r}" for field, column in file["columns"].items())
            unused = names_shown(map(printable, file["unused"])) or "none"
            who = f"{file['silo']} {file['split']}" if file["silo"] else file["split"]
            used.setdefault((f"{file['format']}: {read}", unused), []).append(who)
    files = [
        f"{', '.join(who[:_EXAMPLES])}{f' and {len(who) - _EXAMPLES} more' if len(who) > _EXAMPLES else ''}: "
        f"{read}; unused columns: {unused}"
        for (read, unused), who in used.items()
    ]
    return [*(legend if facts["silos"] else []), *files]


def _print_example(out: Console, work: Workspace, name: str) -> None:
    """Print one encoded train row of a silo, of median length; the tokens with a loss stand out."""
    ordered = sorted(work.examples(name), key=lambda example: example.length)
    example, tokenizer = ordered[len(ordered) // 2], work.encoder_for(name).tokenizer

    def show(form: Example, colour: str) -> None:
        shown = Text()
        for is_trained, ids in parts(form):
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            lines = "\n".join(printable(line) for line in text.split("\n"))
            shown.append(lines, style=f"bold {colour} underline" if is_trained else "dim")
        out.print(shown, soft_wrap=True)

    out.print(f"{name}: a train row of {len(example.input_ids)} tokens; the loss is on the underlined green ones")
    show(example, "green")
    if example.rejected:
        out.print(f"{name}: the same row with the rejected answer, of {len(example.rejected.input_ids)} tokens")
        show(example.rejected, "red")
