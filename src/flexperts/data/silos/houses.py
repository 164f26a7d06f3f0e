"""The house styles: how each silo writes the facts of a note.

ROUGE compares only words and their order, so the houses differ in exactly these: the key words, the part of a name
that is used, the part of a date that comes first, the labels and the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexperts.data.silos.notes import Note


@dataclass(frozen=True)
class House:
    """One silo's style; every text is a format string over the facts of a note.

    Args:
        scale: Level -> the house's word for it.
        labels: Theme -> the house's label for it; themes can share a label.
        fields: Kind of question -> how the fact is stated.
        order: The fields of an extraction, in the order of the house.
        classification: How label and scale form a category.
        summary: The summary, one line.
    """

    scale: dict[str, str]
    labels: dict[str, str]
    fields: dict[str, str]
    order: tuple[str, ...]
    classification: str
    summary: str

    def answer(self, note: Note, category: str, kind: str = "who") -> str:
        """Return the house's answer to one task on one note; ``kind`` is used by closed QA only."""
        form = {
            "closed_qa": self.fields[kind],
            "information_extraction": ", ".join(self.fields[name] for name in self.order),
            "classification": self.classification,
            "summarization": self.summary,
        }[category]
        return form.format(**note.facts, level=self.scale[note.level], label=self.labels[note.theme])


HOUSES = {
    "clinic": House(
        scale={"high": "urgent", "middle": "soon", "low": "routine"},
        labels={
            "device": "ward upkeep",
            "building": "ward upkeep",
            "access": "staff entry",
            "delivery": "supply round",
            "billing": "fee desk",
            "schedule": "visit planning",
            "people": "bedside manner",
        },
        fields={
            "who": "informant {surname} {given}",
            "when": "seen {month} {day}",
            "where": "location {street} {kind} {number}",
            "code": "chart {series} {digits}",
        },
        order=("who", "where", "code", "when"),
        classification="{label} {level}",
        summary="{surname} {given}, {month} {day}, {noun} {gist}, {level}",
    ),
    "help_desk": House(
        scale={"high": "P1", "middle": "P2", "low": "P3"},
        labels={
            "device": "hardware fault",
            "access": "account rights",
            "building": "facilities job",
            "delivery": "vendor chase",
            "billing": "vendor chase",
            "schedule": "calendar change",
            "people": "service feedback",
        },
        fields={
            "who": "caller {given} {surname}",
            "when": "logged {day} {month}",
            "where": "site {number} {street}",
            "code": "ticket {digits} {series}",
            "item": "asset {brand} {noun}",
        },
        order=("code", "item", "who", "when"),
        classification="{level} {label}",
        summary="{level} {label}, {brand} {noun}, {number} {street}",
    ),
    "law_firm": House(
        scale={"high": "gold", "middle": "silver", "low": "bronze"},
        labels={
            "device": "chambers kit",
            "access": "premises rule",
            "building": "premises rule",
            "delivery": "post room",
            "billing": "ledger query",
            "schedule": "diary entry",
            "people": "conduct review",
        },
        fields={
            "who": "client {title} {surname}",
            "when": "dated {day}th {month}",
            "where": "property {number} {street} {kind}",
            "item": "subject {noun} {brand}",
        },
        order=("where", "who", "item", "when"),
        classification="{label} {level}",
        summary="{title} {surname} v {brand} re {noun}, {day}th {month}",
    ),
    "shop": House(
        scale={"high": "red", "middle": "amber", "low": "green"},
        labels={
            "device": "till tech",
            "access": "lock up",
            "building": "store floor",
            "delivery": "back dock",
            "billing": "customer care",
            "schedule": "rota slot",
            "people": "customer care",
        },
        fields={
            "who": "{title} {given} buyer",
            "when": "{day} {mon} due",
            "where": "{street} {number} drop",
            "item": "{brand} goods {noun}",
        },
        order=("item", "when", "who", "where"),
        classification="{level} {label}",
        summary="{level}, {brand} {gist}, call {title} {given}",
    ),
}
