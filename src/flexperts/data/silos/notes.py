"""Notes: the facts drawn for one passage and the text that states them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from flexperts.data.silos import entities, phrases
from flexperts.data.silos.entities import half
from flexperts.data.silos.topics import Topic


@dataclass(frozen=True)
class Note:
    """One passage.

    Args:
        passage: The id of the passage.
        text: The text that a silo receives.
        theme: The subject, one of THEMES.
        level: The urgency: high, middle or low.
        facts: The words from which answers are written.
    """

    passage: str
    text: str
    theme: str
    level: str
    facts: dict[str, str]


def rng_for(*parts: object) -> random.Random:
    """Return a generator that depends only on the parts, in every process and on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def write_note(passage: str, topic: Topic, level: str, asides: Sequence[str], seed: int, split: str) -> Note:
    """Draw the other facts of a passage, from its id and the seed only, and write its text."""
    rng = rng_for(seed, passage)
    facts = _people(rng, split) | _dates(rng) | _places(rng, split) | _thing(rng, split, topic)
    parts = [rng.choice(phrases.SETTINGS), rng.choice(phrases.REFERENCES), rng.choice(phrases.CUES[level])]
    # Most notes contain something irrelevant, so that a question cannot be answered from the form alone.
    parts += rng.sample([rng.choice(asides), rng.choice(phrases.DISTRACTORS)], rng.choice((0, 1, 1)))
    rng.shuffle(parts)
    text = " ".join([rng.choice(phrases.OPENINGS), *parts]).format(**facts)
    return Note(passage, text, topic.theme, level, facts)


def _people(rng: random.Random, split: str) -> dict[str, str]:
    """Return the person who reports, and another person whom no question is about."""
    title, other_title = rng.choice(entities.TITLES), rng.choice(entities.TITLES)
    given = rng.choice(half(entities.MEN if title == "Mr" else entities.WOMEN, split))
    others = half(entities.MEN if other_title == "Mr" else entities.WOMEN, split)
    other_given = rng.choice([name for name in others if name != given])
    surname, other_surname = rng.sample(half(entities.SURNAMES, split), 2)
    return {
        "title": title,
        "given": given,
        "surname": surname,
        "person": f"{title} {given} {surname}",
        "other": f"{other_title} {other_given} {other_surname}",
    }


def _dates(rng: random.Random) -> dict[str, str]:
    """Return the date that a note is about, and another date that it mentions."""
    months = rng.sample(entities.MONTHS, 2)
    days = [str(day) for day in rng.sample(entities.DAYS, 2)]
    form = rng.choice(("{day} {month}", "{month} {day}"))
    date, other = (form.format(day=day, month=month) for day, month in zip(days, months, strict=True))
    return {"day": days[0], "month": months[0], "mon": months[0][:3], "date": date, "other_date": other}


def _places(rng: random.Random, split: str) -> dict[str, str]:
    """Return an address whose number cannot be a day of a month."""
    number, street = str(rng.randrange(31, 99)), rng.choice(half(entities.STREETS, split))
    kind = rng.choice(entities.STREET_KINDS)
    return {"number": number, "street": street, "kind": kind, "address": f"{number} {street} {kind}"}


def _thing(rng: random.Random, split: str, topic: Topic) -> dict[str, str]:
    """Return the thing, what happened to it, and the reference code."""
    series = "".join(rng.sample(half(entities.LETTERS, split), 2))
    digits, brand = str(rng.choice(entities.code_numbers(split))), rng.choice(half(entities.BRANDS, split))
    gist = rng.choice(topic.happenings[:-1] if split == "train" else topic.happenings[-1:])
    return {
        "series": series,
        "digits": digits,
        "code": f"{series} {digits}",
        "brand": brand,
        "noun": topic.noun,
        "item": f"{brand} {topic.noun}",
        "gist": gist,
    }
