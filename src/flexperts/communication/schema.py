"""What each message may hold besides weights: known names, strict types, finite numbers, bounded sizes.

Everything from another machine passes through ``checked`` before it is used. Measures are finite numbers; counts
are whole numbers from 0. Only a score may be NaN or infinite: a model that has diverged has such scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from flwr.app import RecordDict
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import create_model as _model

from flexperts.errors import FederationError, incompatible, shown

LONGEST_TEXT = 1 << 22
"""Most characters of a text field; the largest are reports and agreements about every expert of a base."""
LONGEST_NAME = 400
"""Most characters of a name that are read; no valid one has more."""
ROOM = 1 << 16
"""Bytes that a reply may have besides its weights and its report."""
MOST_ROUNDS = 10**6
MOST = 2**53
MOST_ROWS = 2**31
MOST_VERSIONS = 1000
"""Most versions of the shared weights in a request; a server keeps no more."""
_LARGEST = float(np.finfo(np.float32).max)


def _no_not_finite(text: str) -> str:
    """Refuse JSON's NaN and Infinity, which ``json`` reads and no file of a run may hold."""

    try:
        json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return text


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


def _none_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has a character that cannot be printed")
    return text


Count = Annotated[int, Field(ge=0, le=MOST)]
Rows = Annotated[int, Field(ge=0, le=MOST_ROWS)]
Round = Annotated[int, Field(ge=0, le=MOST_ROUNDS)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Word = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
"""A short text that is shown as it is, such as a layer's name."""
Fingerprint = Annotated[Word, Field(min_length=1)]
Json = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT), AfterValidator(_no_not_finite)]
_Score = Annotated[Annotated[float, Field(ge=0, le=_LARGEST)] | None, BeforeValidator(_none_if_not_finite)]
_Points = Annotated[Annotated[float, Field(ge=0, le=100)] | None, BeforeValidator(_none_if_not_finite)]
_Margin = Annotated[Number | None, BeforeValidator(_none_if_not_finite)]
State = Literal["zero_shot", "global", "personalized"]


class Fields(BaseModel):
    """Base of all schemas: no other fields, no conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


AnyFields = TypeVar("AnyFields", bound=Fields)


# What a silo sends.


class Joining(Fields):
    """A client's introduction; ``report`` is JSON of the method's ``report_type``."""

    client: Name
    base: Fingerprint
    train_rows: Rows
    report: Json
    card: Annotated[str, Field(max_length=ROOM)] = ""
    """JSON of its keys for secure aggregation."""
    silos: Annotated[int, Field(ge=0, le=MOST_ROWS)] = 0
    """Silos of a region, whose rows may be fewer in a round without some of them; 0 = a silo itself."""


class InitialFields(Fields):
    """The texts beside the initial weights: the parameter table as JSON, and the digest of both, SHA-256 in hex."""

    client: Name
    split: Json
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SplitRow(Fields):
    """One row of the table of parameters."""

    group: Literal["shared", "personal", "frozen"]
    tensors: Count
    parameters: Count
    bytes: Count
    trained: Literal["yes", "no"]
    leaves: Word


class KeysFields(Fields):
    """Keys of a round with secure aggregation, shares of the round before, and the signature of its survivors; each
    is JSON or empty."""

    client: Name
    keys: Annotated[str, Field(max_length=LONGEST_TEXT)]
    shares: Annotated[str, Field(max_length=LONGEST_TEXT)]
    agreed: Annotated[str, Field(max_length=ROOM)] = ""


_TABLE = TypeAdapter(Annotated[list[SplitRow], Field(max_length=3)])


class Heading(Fields):
    """Who answers to which round; of the round that was trained or evaluated."""

    client: Name
    round: Round


class TrainedHeading(Heading):
    """The heading of an update, with the fingerprint of the base that was trained."""

    base: Fingerprint


MEASURES: Mapping[str, Any] = {
    "loss": Number,
    "steps": Count,
    "shared_steps": Count,  # only where changes count per step
    "tokens": Count,
    "shared_parameters": Count,
    "personal_parameters": Count,
    "rows": Number,  # it must equal the rows that the client had when it joined
    "personal_sent": Count,
}
"""A client's measures of one round of training."""


class NoNumbers(Fields):
    """The numbers of a message that has none."""


@lru_cache(64)
def measure_fields(told: tuple[str, ...]) -> type[Fields]:
    """Return the schema of a round's measures.

    Args:
        told: Those that the server receives; a defence may hide some.
    """
    return _made("Measures", {name: (MEASURES[name], ...) for name in told})


@lru_cache(64)
def score_fields(states: tuple[str, ...], *, answers: bool, pairs: bool = False) -> type[Fields]:
    """Return the schema of an evaluation's numbers: scores, and about answers all of their counts or none.

    Args:
        states: The model states that were asked for.
        answers: Whether answers were asked for; without them ROUGE-L and the counts may be missing.
        pairs: Whether the run's rows are preferences, so that rewards are among the scores.
    """
    optional = ... if answers else None
    fields: dict[str, Any] = {"rows": (Number, ...)}
    fields |= {f"nll.{state}": (_Score, ...) for state in states}
    fields |= {f"rouge_l.{state}": (_Points, optional) for state in states}
    for state in states if pairs else ():
        fields |= {f"reward_margin.{state}": (_Margin, ...), f"reward_accuracy.{state}": (_Points, ...)}
    fields |= dict.fromkeys(answer_counts(states), (Count | None, None))
    return _made("Scores", fields)


def answer_counts(states: Collection[str]) -> tuple[str, ...]:
    """Return the names of an evaluation's counts about answers."""
    return ("max_new_tokens", "longer_references", *(f"cut.{state}" for state in states))


# What a server sends.


class Query(Fields):
    """A request for a client's introduction."""

    run: Annotated[str, Field(max_length=200)] = ""


class InitialQuery(Query):
    """A request for initial weights; ``agreement`` is JSON, and null before there is one."""

    agreement: Json
    weights: bool = True


class KeysQuery(Query):
    """A request for keys of a round with secure aggregation, for shares of the one before or both, or for the
    signature of a list of survivors; each is JSON or empty."""

    setup: Annotated[str, Field(max_length=LONGEST_TEXT)] = ""
    unmask: Annotated[str, Field(max_length=LONGEST_TEXT)] = ""
    closed: Annotated[str, Field(max_length=LONGEST_TEXT)] = ""


class TrainRequest(Query):
    """A request to train the given round."""

    agreement: Json
    round: Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
    masking: Annotated[str, Field(max_length=LONGEST_TEXT)] = ""
    """JSON of other clients' keys for secure aggregation."""


class EvaluateRequest(Query):
    """A request to score model states after the given round."""

    agreement: Json
    round: Round
    states: Annotated[list[State], Field(min_length=1, max_length=3)]
    answers: bool


def checked(model: type[AnyFields], values: Mapping[str, Any], sender: str) -> AnyFields:
    """Return a message's values by a schema, or refuse the message: the sender, the field, and what is wrong.

    Args:
        model: The schema.
        values: The values.
        sender: Who sent them, for errors.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise refusal(error, sender) from None


def table_of(split: str, sender: str) -> list[dict[str, str | int]]:
    """Return the rows of a parameter table, from JSON that another machine sent."""
    try:
        rows = _TABLE.validate_json(split, strict=True)
    except ValidationError as error:
        raise refusal(error, f"{sender}'s split") from None
    return [row.model_dump() for row in rows]


def refusal(error: ValidationError, sender: str) -> FederationError:
    """Return the error for values that break a schema; it names the first one."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"])) or "the value"
    if first["type"] == "missing":
        return incompatible(f"{sender} reports {name} = None", "it cannot be read without this field")
    known = _RULES.get(first["type"])
    rule = known.format(**first["ctx"]) if known and "ctx" in first else known or first["msg"]
    return incompatible(f"{sender} reports {name[:100]} = {shown(first['input'])}", rule)


_RULES = {
    "float_type": "it must be a number",
    "int_type": "it must be a whole number",
    "finite_number": "it must be a number",
    "extra_forbidden": "no such field is known",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than_equal": "it must be at most {le:g}",
}
"""pydantic's type of an error -> the rule in our words."""


def check_size(content: RecordDict, most: int, sender: str, remedy: str | None = None) -> None:
    """Refuse a message that is larger than what can be expected, before anything in it is read.

    Args:
        content: The message.
        most: Bytes that it may have.
        sender: Who sent it.
        remedy: What a user can do; by default nothing but using the same version.
    """
    size = sum(map(_size_of, content.items()))
    if size > most:
        error = incompatible(f"{sender} sent {size:,} bytes", f"at most {most:,} are expected here")
        raise error if remedy is None else FederationError(error.value, error.rule, remedy)


def _size_of(item: tuple[str, Any]) -> int:
    """Return the bytes of a record's names and values."""
    name, record = item
    return len(name) + sum(len(key) + _bytes(value) for key, value in record.items())


def _bytes(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(getattr(value, "data", b"")) + 8


def _made(name: str, fields: dict[str, Any]) -> type[Fields]:
    return _model(name, __base__=Fields, **fields)
