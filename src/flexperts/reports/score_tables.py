"""Tables of scores: the comparison, the change of general ability, and answers that were cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexperts.reports.cells import (
    MISSING,
    Cell,
    Column,
    Table,
    interval,
    mark_best,
    number,
    p_value,
    percent,
    size,
    spread,
    words,
)
from flexperts.reports.notes import REFERENCE_MARK, ability_note, counts, floor_note, main_note, reward_note
from flexperts.reports.reading import (
    METRICS,
    REWARDS,
    STATES,
    Comparison,
    Entry,
    ability,
    against,
    change,
    each_of,
    is_ranked,
    mean,
    ordered,
    own,
    own_state_words,
    stat,
    trained_state,
    unranked,
)

DIGITS = {"rouge_l": 1, "nll": 3, "reward_accuracy": 1, "reward_margin": 3}
"""Score -> digits after the point."""
WHO = (Column("entry", words=True), Column("own state", words=True))
"""The first columns of a table of entries in their own state."""
_WITHIN_ABILITY = (("general", "rouge_l"), ("general", "nll"), ("mmlu", "accuracy"))


def main_table(comparison: Comparison) -> Table:
    """Return the comparison: one row per entry, best first, and the unchanged base last."""
    entries = ordered(comparison)
    rows = [_main_row(comparison, entry) for entry in entries]
    rows = mark_best(rows, 2, left_out=unranked(entries, "rouge_l"))
    rows = mark_best(rows, 5, lowest=True, left_out=unranked(entries, "nll"))
    rows += _base_row(comparison)
    return Table("main", "Scores and differences", main_note(comparison), _main_header(comparison), tuple(rows))


def reward_table(comparison: Comparison) -> Table:
    """Return how well own and global states tell chosen from rejected answers; no rows without preferences."""
    entries = [entry for entry in ordered(comparison) if own(entry, "own", "reward_margin")]
    state = own_state_words(comparison)
    level = f"{100 * comparison['confidence']:g}\u00a0%"
    groups = (place_words(comparison, state, "own"), place_words(comparison, "global", "own"))
    tested = [c for m in REWARDS.values() for c in (m, f"Δ {m} to reference [{level}]", "p, adjusted")]
    header = (
        *WHO,
        *(Column(name, groups[0]) for name in tested),
        *(Column(name, groups[1]) for name in REWARDS.values()),
    )
    rows = [
        (
            words(_marked(comparison, entry)),
            own_state(entry),
            *(cell for metric in REWARDS for cell in _tested(entry, metric)),
            *(spread(stat(entry, "global", "own", metric), DIGITS[metric]) for metric in REWARDS),
        )
        for entry in entries
    ]
    for column, metric in zip((2, 5), REWARDS, strict=True):
        rows = mark_best(rows, column, left_out=unranked(entries, metric))
    return Table("rewards", "Preferences", reward_note(comparison), header, tuple(rows))


def ability_table(comparison: Comparison) -> Table:
    """Return the general ability of every trained state, and its difference to zero-shot."""
    measured = [(e, state) for e in ordered(comparison) for state in e["scores"] if _is_measured(e, state)]
    rows = tuple(
        (words(e["name"]), words(STATES[s]), *(c for where in _WITHIN_ABILITY for c in _ability(e, s, *where)))
        for e, s in measured
    )
    header = [Column("entry", words=True), Column("state", words=True)]
    for name, place in (("ROUGE-L", "general tasks"), ("NLL", "general tasks"), ("accuracy, %", "MMLU")):
        header += [Column(name, place), Column(f"{name}, minus zero-shot", place)]
    title = "What personalization cost in general ability"
    return Table("ability", title, ability_note(comparison), tuple(header), rows)


def _is_measured(entry: Entry, state: str) -> bool:
    """Return whether a state has scores of general ability; zero-shot counts only as the entry's own state."""
    trained = state != "zero_shot" or entry["own_state"] == "zero_shot"
    return trained and any(stat(entry, state, *where) for where in _WITHIN_ABILITY)


def _ability(entry: Entry, state: str, place: str, metric: str) -> tuple[Cell, Cell]:
    found, difference = stat(entry, state, place, metric), change(entry, state, place, metric)
    if metric == "accuracy":
        return _percent(found), _percent(difference, sign=True)
    test, digits = ability(entry, state, metric), DIGITS[metric]
    return spread(found, digits), interval(test, digits) if test else spread(difference, digits, sign=True)


def _percent(found: Any, *, sign: bool = False) -> Cell:
    cell = percent(mean(found), sign=sign)
    std = percent((found or {}).get("std"))
    return cell if cell.value is None or std.value is None else Cell(f"{cell.text} ± {std.text}", cell.value)


def _main_header(comparison: Comparison) -> tuple[Column, ...]:
    state = own_state_words(comparison)
    own_rows, others = (place_words(comparison, state, place) for place in ("own", "others"))
    shared, shared_others = (place_words(comparison, "global", place) for place in ("own", "others"))
    level = f"{100 * comparison['confidence']:g}\u00a0%"
    tests = ("ROUGE-L", f"Δ ROUGE-L to reference [{level}]", "p, adjusted")
    losses = ("NLL", f"Δ NLL to reference [{level}]", "p, adjusted")
    return (
        *WHO,
        *(Column(name, own_rows) for name in (*tests, *losses)),
        *(Column(name, shared) for name in ("ROUGE-L", "NLL")),
        *(Column(name, others) for name in ("ROUGE-L", "NLL")),
        *(Column(name, shared_others) for name in ("ROUGE-L", "NLL")),
        *(Column(name, each_of(comparison)) for name in ("sent", "received")),
        Column("training, s"),
    )


def place_words(comparison: Comparison, state: str, place: str) -> str:
    """Return the heading of columns of a state's scores on own or others' rows."""
    rows = {"own": "own", "others": "others'"}[place]
    return f"{state}, {rows} {comparison['split']}"


def _main_row(comparison: Comparison, entry: Entry) -> tuple[Cell, ...]:
    sent, seconds = entry.get("bytes") or {}, entry.get("seconds") or {}
    return (
        words(_marked(comparison, entry)),
        own_state(entry),
        *_tested(entry, "rouge_l"),
        *_tested(entry, "nll"),
        *(spread(stat(entry, "global", "own", metric), DIGITS[metric]) for metric in METRICS),
        *(spread(own(entry, "others", metric), DIGITS[metric]) for metric in METRICS),
        *(spread(stat(entry, "global", "others", metric), DIGITS[metric]) for metric in METRICS),
        size(sent.get("uplink_per_client_per_round")),
        size(sent.get("downlink_per_client_per_round")),
        number(seconds.get("training"), 0),
    )


def _marked(comparison: Comparison, entry: Entry) -> str:
    """Return an entry's name, with a mark at the reference's."""
    return str(entry["name"]) + (REFERENCE_MARK if entry["name"] == comparison["reference"] else "")


def own_state(entry: Entry) -> Cell:
    """Return the name of an entry's own state: the last state of its method."""
    return words(STATES.get(entry["own_state"], entry["own_state"]))


def trained(entry: Entry) -> Cell:
    """Return the name of the last state of an entry's method."""
    return words(STATES[trained_state(entry)])


def _tested(entry: Entry, metric: str) -> tuple[Cell, Cell, Cell]:
    test, digits = against(entry, metric), DIGITS[metric]
    return (
        spread(own(entry, "own", metric), digits),
        interval(test, digits),
        p_value((test or {}).get("p_adjusted")),
    )


def _base_row(comparison: Comparison) -> list[tuple[Cell, ...]]:
    """Return the unchanged base's row, from the first entry with its scores, unless the base is an entry."""
    entries = sorted(comparison["entries"], key=lambda entry: not is_ranked(entry, "nll"))
    measured = [e for e in entries if stat(e, "zero_shot", "own", "nll") or stat(e, "zero_shot", "own", "rouge_l")]
    if not measured or any(e["own_state"] == "zero_shot" for e in entries):
        return []
    scores = {"zero_shot": measured[0]["scores"]["zero_shot"]}
    return [_main_row(comparison, {"name": "base, untrained", "own_state": "zero_shot", "scores": scores})]


_INSTEAD = {f"all {name}": state for state, name in STATES.items()} | {"all local": "local", "each's best": "best"}
"""What clients could have in place of what they keep -> its name in ``comparison.json``."""


def floor_table(comparison: Comparison) -> Table:
    """Return, for entries with a floor, what clients keep against each simple choice, and against their best."""
    dpo = any("loss" in entry["floor"] for entry in comparison["entries"] if entry.get("floor"))
    loss = "DPO loss" if dpo else "NLL"
    group = f"{loss} of what clients keep, minus this choice's, own {comparison['split']}"
    header = (
        Column("entry", words=True),
        Column("instead of", words=True),
        *(Column(name, group) for name in ("clients harmed (clearly)", "mean", "worst tenth of clients")),
    )
    entries = [entry for entry in ordered(comparison) if entry.get("floor")]
    rows = tuple(
        (words(entry["name"]), words(name), *_floor_cells(entry["floor"]["against"][choice]))
        for entry in entries
        for name, choice in _INSTEAD.items()
        if choice in entry["floor"]["against"]
    )
    return Table("floor", "What clients keep", floor_note(comparison, entries), header, rows)


def _floor_cells(test: Mapping[str, Any]) -> tuple[Cell, ...]:
    harmed = test["harmed"]
    counted = Cell(f"{harmed['count']} of {harmed['clients']} ({harmed['clear']})", harmed["count"])
    return counted, *(interval(test.get(kind), DIGITS["nll"]) for kind in ("mean", "worst"))


_ANSWERING = [state for state in STATES if state != "chosen"]


def answer_table(comparison: Comparison) -> Table:
    """Return how many answers reached the limit, by state, and by client in the own state; no rows without any."""
    clients = comparison["clients"]
    counted = [entry for entry in ordered(comparison) if entry.get("answers")]
    is_shown = any(_total(e, "longer_references") or _total(e, "cut", trained_state(e)) for e in counted)
    header = (
        *WHO,
        Column("limit, tokens"),
        Column("longer references"),
        *(Column(STATES[state], "cut, all clients") for state in _ANSWERING),
        *(Column(client, f"cut, {own_state_words(comparison)}") for client in clients),
    )
    note = (
        "An answer is cut if it reaches evaluation.max_new_tokens before it ends; a longer reference cannot be "
        f"matched completely, which lowers ROUGE-L. Counts are over all seeds. {counts(comparison)}"
    )
    rows = tuple(_row(entry, clients) for entry in counted) if is_shown else ()
    return Table("answers", "Answers that were cut", note, header, rows)


def _row(entry: Entry, clients: Any) -> tuple[Cell, ...]:
    answers = entry["answers"]
    by_client, rows = answers["clients"], _total(entry, "rows")
    cut = (_share(_total(entry, "cut", s) if s in entry["scores"] else None, rows) for s in _ANSWERING)
    own = (by_client.get(client) for client in clients)
    return (
        words(entry["name"]),
        trained(entry),
        Cell(", ".join(map(str, answers["max_new_tokens"]))),
        _share(_total(entry, "longer_references"), rows),
        *cut,
        *(_share(its["cut"][trained_state(entry)], its["rows"]) if its else _share(None, 0) for its in own),
    )


def _total(entry: Entry, key: str, state: str | None = None) -> int:
    clients = entry["answers"]["clients"].values()
    return int(sum(client[key] if state is None else client[key][state] for client in clients))


def _share(count: int | None, rows: int) -> Cell:
    return Cell(MISSING) if count is None else Cell(f"{count} of {rows}", float(count))
