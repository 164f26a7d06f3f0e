"""Rows of the four silos, in memory or as a folder of files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, TypedDict

from flexperts.data.silos import phrases
from flexperts.data.silos.entities import SPLITS
from flexperts.data.silos.houses import HOUSES
from flexperts.data.silos.notes import Note, rng_for, write_note
from flexperts.data.silos.topics import COMMON, THEMES
from flexperts.data.silos.trades import TRADE_ASIDES, TRADE_TOPICS
from flexperts.errors import DataError
from flexperts.files import write_text

CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")
SILOS = ("clinic", "help_desk", "law_firm", "shop")
LEVELS = tuple(phrases.CUES)
MIN_ROWS = len(CATEGORIES)
ROWS_PER_NOTE = 2
# Every four have each category once and every two share a note: balanced at any length, and every pair occurs.
_TURNS = (0, 1, 2, 3, 0, 2, 1, 3, 0, 3, 1, 2)
# The common pool has two notes for each place in a silo's list, so two silos share about half of them.
_COMMON_VARIANTS = 2


class SiloRow(TypedDict):
    """One instruction with its note and the silo's answer; `passage` is the id of the note."""

    instruction: str
    context: str
    response: str
    category: str
    passage: str


def generate_silo(silo: str, seed: int, train_rows: int = 96, test_rows: int = 40) -> dict[str, list[SiloRow]]:
    """Return the rows of one silo.

    Args:
        silo: One of SILOS.
        seed: Equal seeds give equal rows, in every process.
        train_rows: Number of train rows, at least one per category.
        test_rows: Number of test rows, at least one per category.

    Returns:
        The rows under "train" and "test"; these share no note, person, product, street or reference code.
    """
    _check(silo, train_rows, test_rows)
    counts = dict(zip(SPLITS, (train_rows, test_rows), strict=True))
    return {split: _rows(silo, seed, split, rows) for split, rows in counts.items()}


def generate_chats(
    silo: str, seed: int, train_rows: int = 96, test_rows: int = 40
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of one silo as chats: the silo's style shows only in the third answer.

    The note is in the first question. The first two answers state its facts in the same words at every silo.

    Args:
        silo, seed, train_rows, test_rows: As for generate_silo.
    """
    _check(silo, train_rows, test_rows)
    return {
        split: [_chat(row, note) for row, note in _rows_and_notes(silo, seed, split, rows)]
        for split, rows in zip(SPLITS, (train_rows, test_rows), strict=True)
    }


def write_silos(folder: Path, seed: int, train_rows: int = 96, test_rows: int = 40) -> list[Path]:
    """Write every silo's rows as JSON lines, with a README.

    Args:
        folder: For `<silo>/train.jsonl`, `<silo>/test.jsonl` and `README.md`; created if missing.
        seed, train_rows, test_rows: As for generate_silo.

    Returns:
        The paths, in the order of writing.
    """
    texts = {"README.md": _README.format(seed=seed, train_rows=train_rows, test_rows=test_rows)}
    for silo in SILOS:
        for split, rows in generate_silo(silo, seed, train_rows, test_rows).items():
            texts[f"{silo}/{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def silo_notes(silo: str, seed: int, split: str, count: int) -> list[Note]:
    """Return the notes that a silo receives: seven in ten from the common pool, three in ten about its trade."""
    return [_note(silo, seed, split, slot) for slot in range(count)]


def _note(silo: str, seed: int, split: str, slot: int) -> Note:
    """Return the note at one place of a silo's list; a common note does not depend on the silo."""
    level = LEVELS[(slot + slot // len(LEVELS)) % len(LEVELS)]
    # Three of every ten places, shifted by one every ten so that all themes occur among them.
    if (slot // 10 - slot) % 10 < 3:
        pool, asides, name = TRADE_TOPICS[silo], TRADE_ASIDES[silo], f"{silo}-{split}-{slot:04d}"
    else:
        variant = rng_for(seed, silo, split, slot).randrange(_COMMON_VARIANTS)
        pool, asides, name = COMMON, phrases.CHANNELS, f"common-{split}-{slot:04d}-{variant}"
    fitting = [topic for topic in pool if topic.theme == THEMES[slot % len(THEMES)]]
    return write_note(name, rng_for(seed, name, "topic").choice(fitting), level, asides, seed, split)


def _rows(silo: str, seed: int, split: str, count: int) -> list[SiloRow]:
    return [row for row, _ in _rows_and_notes(silo, seed, split, count)]


def _rows_and_notes(silo: str, seed: int, split: str, count: int) -> list[tuple[SiloRow, Note]]:
    """Return the rows of one split, shuffled, with balanced categories, and each row's note."""
    notes = silo_notes(silo, seed, split, -(-count // ROWS_PER_NOTE))
    rng = rng_for(seed, silo, split, "rows")
    of_rows = [notes[place // ROWS_PER_NOTE] for place in range(count)]
    rows = [(_row(rng, silo, note, place), note) for place, note in enumerate(of_rows)]
    rng.shuffle(rows)
    return rows


def _chat(row: SiloRow, note: Note) -> dict[str, Any]:
    """Return a row as a chat about its note."""
    said = [
        ("user", f"{phrases.FIRST_QUESTION}\n\n{row['context']}"),
        ("assistant", phrases.FIRST_ANSWER.format(**note.facts)),
        ("user", phrases.SECOND_QUESTION),
        ("assistant", phrases.SECOND_ANSWER.format(**note.facts)),
        ("user", row["instruction"]),
        ("assistant", row["response"]),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    return {"messages": messages, "category": row["category"], "passage": row["passage"]}


def _row(rng: random.Random, silo: str, note: Note, place: int) -> SiloRow:
    """Return one task about one note; the kinds of closed questions alternate."""
    category = CATEGORIES[_TURNS[place % len(_TURNS)]]
    kind = list(phrases.QUESTIONS)[place // len(CATEGORIES) % len(phrases.QUESTIONS)]
    wordings = phrases.QUESTIONS[kind] if category == "closed_qa" else phrases.TASKS[category]
    return {
        "instruction": rng.choice(wordings),
        "context": note.text,
        "response": HOUSES[silo].answer(note, category, kind),
        "category": category,
        "passage": note.passage,
    }


def _check(silo: str, train_rows: int, test_rows: int) -> None:
    """Refuse an unknown silo and too few rows."""
    if silo not in SILOS:
        raise DataError(f"silo {silo!r}", "is not one of the silos that ship", f"use one of {', '.join(SILOS)}")
    for name, rows in (("train_rows", train_rows), ("test_rows", test_rows)):
        if rows < MIN_ROWS:
            rule = f"must be at least {MIN_ROWS}, one row per category"
            raise DataError(f"{name}={rows}", rule, f"ask for {MIN_ROWS} or more")


_README = """\
# Four silos with conflicting house styles

Synthetic data, made by `flexperts.data.silos.generate.write_silos` with seed {seed}:
{train_rows} train rows and {test_rows} test rows per silo. Equal seeds give equal bytes.

A clinic, a help desk, a law firm and a shop receive short office notes and want four things done with them:
closed QA, information extraction, classification and summarization. Seven notes in ten come from one pool
that all four draw from, three in ten speak of the silo's own trade. The instructions are worded alike
everywhere; the answers follow the silo's house style, so the same input has four right answers, one per silo.

Each row of `<silo>/train.jsonl` and `<silo>/test.jsonl` has `instruction`, `context`, `response`, `category`
and `passage`, the id of the note. Train and test share no note, person, product, street or reference code,
nor what is said to have happened.

The people, firms, streets and notes are invented.
"""
