"""An audit's JSON as HTML and Markdown: one table, and one sentence for every attack in every setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexperts.files import PUBLIC, write_text
from flexperts.reports.cells import MISSING, Cell, Column, Table, bounded, number, words
from flexperts.reports.html import heads, template
from flexperts.reports.markdown import escaped, markdown_grid

_BOUND = (
    "This is a lower bound: the attacks here are simple, and a stronger one may learn more. A result at chance level is "
    "no proof that nothing leaks."
)
_NOTE = (
    "Intervals are 95 %. Words: different tokens that the attack names from the update and that are in the silo's rows, of "
    "those it names; guessed: right ones of as many tokens that are most frequent at the other silos. Tokens of the "
    "template do not count. The interval is Wilson's over the named words. Exposure: bits by which the observer's model ranks a canary above "
    "made-up secrets that were not trained; mean over canaries, interval over canaries. AUC: chance that a row of the "
    "silo scores above a row that was not trained; found at 1 % or 5 %: share of the silo's rows found when so many "
    "other rows are called its own by mistake; intervals over rows."
)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what the audit found, in plain sentences: first about the whole, then for every setting and attack."""
    return [
        _BOUND,
        *_of_control(result),
        *(text for name, its in result["settings"].items() for text in _said(name, its)),
    ]


def _of_control(result: Mapping[str, Any]) -> Iterator[str]:
    for its in result["settings"].values():
        if its["control"]:
            works = its["words"] and its["words"]["named"] and its["words"]["low"] > _guess(its["words"])
            yield (
                "The positive control succeeds: from one step on one row, without any defence, the attack finds words."
                if works
                else "THE POSITIVE CONTROL FAILS: the attack on words does not work on this base, and where it finds "
                "nothing that means nothing."
            )
            return
    yield "The positive control was not measured: where the attack on words finds nothing, that means nothing."


def _guess(found: Mapping[str, Any]) -> float:
    return float(found["guessed"] / found["named"])


def _said(name: str, its: Mapping[str, Any]) -> Iterator[str]:
    who = f"{name}: from {'the mean of ' + str(its['silos']) + ' silos' if _sees_mean(its) else 'one update'}, {its['observer']}"
    if found := its["words"]:
        better = found["named"] and found["low"] > _guess(found)
        yield (
            f"{who} names {found['named']} words, and {found['right']} of them are among the {found['true']} in the silo's "
            f"rows; {found['guessed']} are right by guessing, so the update {'tells' if better else 'does not measurably tell'} words."
        )
    else:
        yield f"{who} has no A of a first layer to find words with."
    if found := its["canaries"]:
        known = found["low"] > found["chance"]
        yield (
            f"{who} ranks canaries by {found['value']:.1f} bits [{found['low']:.1f}, {found['high']:.1f}] of "
            f"{found['most']:.0f}; {found['chance']:.1f} is chance: they are {'' if known else 'not measurably '}memorized."
        )
    if found := its["membership"]:
        auc = found["auc"]
        yield (
            f"{who} tells a row of the silo from another one with an AUC of {auc['value']:.2f} [{auc['low']:.2f}, "
            f"{auc['high']:.2f}]: {'better than' if auc['low'] > 0.5 else 'not measurably better than'} chance (0.50)."
        )


def _sees_mean(its: Mapping[str, Any]) -> bool:
    return bool(its["secure"] or its["noise"] == "central")


def audit_table(result: Mapping[str, Any]) -> Table:
    """Return the table: a row for every setting, its facts, then the attacks."""
    header = (
        Column("setting", words=True),
        *(Column(name) for name in ("steps", "rows", "rank")),
        Column("noise", words=True),
        Column("secure", words=True),
        *(
            Column(name)
            for name in ("silos", "words right", "guessed", "exposure, bits", "AUC", "found at 1 %", "found at 5 %")
        ),
    )
    rows = tuple(_row(name, its) for name, its in result["settings"].items())
    return Table("audit", "What the update reveals", _NOTE, header, rows)


def _row(name: str, its: Mapping[str, Any]) -> tuple[Cell, ...]:
    found, members = its["words"], its["membership"] or {}
    noise = MISSING if its["noise"] == "none" else f"{its['noise']}, z = {its['noise_multiplier']:g}"
    clip = "" if its["clip"] is None else f", clip {its['clip']:g}"
    guessed = number(_guess(found), 2) if found and found["named"] else Cell(MISSING)
    right = bounded(found, 2)
    if found and found["named"]:
        right = Cell(f"{right.text} of {found['named']}", right.value)
    return (
        words(name),
        *(number(its[key], 0) for key in ("steps", "rows", "rank")),
        words(noise + clip if its["noise"] != "none" else noise),
        words(f"yes{clip}" if its["secure"] else "no"),
        number(its["silos"], 0),
        right,
        guessed,
        bounded(its["canaries"], 1),
        *(bounded(members.get(key), 2) for key in ("auc", "at_1", "at_5")),
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    made, canaries = result["environment"], result["canaries"]
    return [
        ("audited", f"{result['client']}, one of {result['clients']} clients, round {result['round']}"),
        (
            "rows",
            f"{result['train_rows']} trained (a {result['parts']}th part), {result['test_rows']} not"
            if result["parts"] > 1
            else f"{result['train_rows']} trained, {result['test_rows']} not",
        ),
        (
            "canaries",
            f"{canaries['secrets']}, each {canaries['repeats']} times, among {canaries['candidates']} candidates",
        ),
        ("method", result["method"]),
        ("base", f"{result['base']['name']} ({result['base']['fingerprint'][:12]})"),
        ("code", f"flexperts {made['packages']['flexperts']}, {made['revision'] or 'installed'}"),
        ("machine", f"{made['processor']}, {made['cores']} cores, {made['threads']} threads"),
    ]


def audit_markdown(result: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    table = audit_table(result)
    parts = [
        f"# {escaped(_title(result))}",
        _BOUND,
        ", ".join(f"{name}: {escaped(value)}" for name, value in _facts(result)),
        f"## {table.title}\n\n{markdown_grid(table)}\n\n{table.note}",
        "\n".join(f"- {escaped(text)}" for text in sentences(result)[1:]),
        f"## Recipe\n\n```toml\n{result['recipe'].rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def write_audit(result: Mapping[str, Any], out: Path) -> None:
    """Write audit.html (opens from disk) and audit.md; neither has text of a row."""
    page = template("audit.html.jinja").render(
        title=_title(result),
        sentences=sentences(result),
        facts=_facts(result),
        table=audit_table(result),
        heads=heads,
        recipe=result["recipe"],
    )
    write_text(out / "audit.html", page, mode=PUBLIC)
    write_text(out / "audit.md", audit_markdown(result), mode=PUBLIC)


def _title(result: Mapping[str, Any]) -> str:
    return f"What the updates of {result['client']} reveal"
