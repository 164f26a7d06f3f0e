"""An audit's JSON as HTML and Markdown: one table, and one sentence for every attack in every setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scipy.stats import fisher_exact

from flexperts.files import PUBLIC, write_text
from flexperts.reports.cells import MISSING, Cell, Column, Table, bounded, number, words
from flexperts.reports.html import heads, template
from flexperts.reports.markdown import escaped, markdown_grid

_BOUND = (
    "This is a lower bound: the attacks here are simple, and a stronger one may learn more. A result at the level "
    "of chance is no proof that nothing is revealed."
)
_NOTE = (
    "Intervals are 95 %. Words right: of the different tokens that the attack names, the share in the silo's rows, "
    "without the template's tokens; Wilson's interval over the named tokens. Guessed: the same share of as many "
    "tokens that are most frequent at the other silos. Own words: the same for tokens that no other silo's row "
    "has; guessed are the first ones of the vocabulary. Exposure: by how many bits the observed model ranks a "
    "canary above secrets that were not trained; mean and interval over canaries. AUC: the chance that a row of "
    "the silo scores above a row that was not trained. Found at 1 % and 5 %: the share of the silo's rows found "
    "when so many other rows are taken for trained ones; intervals over rows."
)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Return what the audit found: what it can say, the positive control, then every attack in every setting."""
    settings: Mapping[str, Any] = result["settings"]
    return [_BOUND, _of_control(settings), *(text for name, its in settings.items() for text in _said(name, its))]


def _of_control(settings: Mapping[str, Any]) -> str:
    control = next((its["words"] for its in settings.values() if its["control"]), None)
    if not control:
        return "The positive control was not measured: where the attack on words finds nothing, that means nothing."
    if _finds_words(control):
        return "The positive control succeeds: from one step on one row, without a defence, the attack finds words."
    return (
        "THE POSITIVE CONTROL FAILS: the attack on words does not work on this base, and where it finds nothing, "
        "that means nothing."
    )


def _finds_words(found: Mapping[str, Any]) -> bool:
    """Return whether more words are right than as many guesses: Fisher's exact test, one-sided, at 2.5 %.

    Two such tests are made for each update, of all words and of the silo's own.
    """
    tries = [(found[right], found["named"] - found[right]) for right in ("right", "guessed")]
    return bool(fisher_exact(tries, alternative="greater").pvalue < 0.025)


def _said(name: str, its: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for every attack that was made."""
    mean = its["secure"] or its["noise"] == "central"
    who = (
        f"{name}: from {'the mean of ' + str(its['silos']) + ' silos' if mean else 'one update'} {its['observer']}"
    )
    if found := its["words"]:
        own = found["own"]
        yield (
            f"{who} names {found['named']} words, of which {found['right']} are among the {found['true']} of the "
            f"rows ({found['guessed']} by guessing), and {own['right']} of the {own['true']} that no other silo "
            f"has ({own['guessed']} by guessing): the update "
            f"{_verb('reveals', _finds_words(found) or _finds_words(own))} words."
        )
    else:
        yield f"{who} gets no A of a first layer, which the attack on words needs."
    if found := its["canaries"]:
        yield (
            f"{who} has a model that ranks canaries by {found['value']:.1f} of {found['most']:.0f} bits (from "
            f"{found['low']:.1f} to {found['high']:.1f}; chance is {found['chance']:.1f}): the update "
            f"{_verb('reveals', found['low'] > found['chance'])} them."
        )
    if found := its["membership"]:
        auc = found["auc"]
        yield (
            f"{who} has a model that ranks rows of the silo above others with an AUC of {auc['value']:.2f} (from "
            f"{auc['low']:.2f} to {auc['high']:.2f}; chance is 0.50): the weights "
            f"{_verb('reveal', auc['low'] > 0.5)} which rows were trained on."
        )


def _verb(reveals: str, does: bool) -> str:
    return reveals if does else f"{'do' if reveals == 'reveal' else 'does'} not measurably reveal"


def audit_table(result: Mapping[str, Any]) -> Table:
    """Return the table: a row for every setting, its facts, then the attacks."""
    header = (
        Column("setting", words=True),
        *(Column(name) for name in ("steps", "rows", "rank")),
        Column("noise", words=True),
        Column("secure", words=True),
        *(
            Column(name)
            for name in (
                "silos",
                "words right",
                "guessed",
                "own words right",
                "own guessed",
                "exposure, bits",
                "AUC",
                "found at 1 %",
                "found at 5 %",
            )
        ),
    )
    rows = tuple(_row(name, its) for name, its in result["settings"].items())
    return Table("audit", "What the update reveals", _NOTE, header, rows)


def _row(name: str, its: Mapping[str, Any]) -> tuple[Cell, ...]:
    found, members = its["words"], its["membership"] or {}
    noise = MISSING if its["noise"] == "none" else f"{its['noise']}, z = {its['noise_multiplier']:g}"
    clip = "" if its["clip"] is None else f", clip {its['clip']:g}"
    return (
        words(name),
        *(number(its[key], 0) for key in ("steps", "rows", "rank")),
        words(noise + clip if its["noise"] != "none" else noise),
        words(f"yes{clip}" if its["secure"] else "no"),
        number(its["silos"], 0),
        *_word_cells(found),
        *_word_cells(found and found["own"]),
        bounded(its["canaries"], 1),
        *(bounded(members.get(key), 2) for key in ("auc", "at_1", "at_5")),
    )


def _word_cells(found: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    """Return the share of right words with its interval and number, and the share by guessing."""
    if not found or not found["named"]:
        return Cell(MISSING), Cell(MISSING)
    right = bounded(found, 2)
    return Cell(f"{right.text} of {found['named']}", right.value), number(found["guessed"] / found["named"], 2)


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
