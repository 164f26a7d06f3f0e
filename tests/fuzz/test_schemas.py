"""Every field of every message, drawn from its schema: right values are taken, others are refused, no run ends.

The strategies are made from the schemas' JSON Schema, so a field that is added is tried without a change here.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from harness import NUMBERS, PLAIN, TEXT, clean_refusals, fuzz
from hypothesis import strategies as st

from flexperts.client.answer import answer
from flexperts.communication import schema
from flexperts.communication.messages import fields_of, info_of, metrics_of, records
from flexperts.communication.schema import Fields, checked
from flexperts.config.federation import CompressionConfig
from flexperts.engines.flower_private import assume_identity
from flexperts.errors import FederationError
from flexperts.methods.fedavg import FedAvg
from flexperts.methods.kit.server_state import Server
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.recipe import parse_recipe
from flexperts.server.admission import Admission
from flexperts.server.exchange import error_of
from flexperts.server.membership import Introduction

assume_identity(1)
STATES = FedAvg.states
TEXTS: list[type[Fields]] = [
    schema.Joining,
    schema.InitialFields,
    schema.Heading,
    schema.TrainedHeading,
    schema.Query,
    schema.InitialQuery,
    schema.TrainRequest,
    schema.EvaluateRequest,
    schema.KeysQuery,
    schema.KeysFields,
]
"""Schemas of texts and whole numbers: what is in a ConfigRecord."""
NUMBERED: list[type[Fields]] = [
    schema.NoNumbers,
    schema.measure_fields(tuple(schema.MEASURES)),
    schema.score_fields(STATES, answers=True),
    schema.score_fields(STATES, answers=False),
]
"""Schemas of numbers: what is in a MetricRecord."""
SCALARS = st.one_of(st.booleans(), NUMBERS, TEXT, st.binary(max_size=8))
CONFIG = st.one_of(
    SCALARS, st.lists(st.integers(-9, 9), max_size=3), st.lists(TEXT, max_size=3), PLAIN.map(json.dumps)
)
METRIC = st.one_of(NUMBERS, st.lists(st.floats(), max_size=3))


def test_no_schema_is_forgotten() -> None:
    """Base classes aside, every schema of the module is in one of the lists, or is inside another one."""
    found = {one for _, one in inspect.getmembers(schema, inspect.isclass) if issubclass(one, Fields)}
    assert found - {*TEXTS, *NUMBERED} == {Fields, schema.SplitRow}


def right(field: dict[str, Any], defs: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that a field's JSON Schema allows, at its limits more often than elsewhere."""
    if "anyOf" in field:
        return st.one_of([right(one, defs) for one in field["anyOf"] if one.get("type") != "null"])
    if "enum" in field:
        return st.sampled_from(field["enum"])
    match field["type"]:
        case "boolean":
            return st.booleans()
        case "integer" | "number" as kind:
            least, most = field.get("minimum", -(2**53)), field.get("maximum", 2**53)
            inside = st.integers(least, int(most)) if kind == "integer" else st.floats(least, most)
            return inside | st.sampled_from([least, most])
        case "array":
            return st.lists(right(field["items"], defs), min_size=1, max_size=3)
    least, most = field.get("minLength", 0), min(field.get("maxLength", 9), 400)
    return st.sampled_from(["null", "[1, 2.5]", "{}", '"a"', "x" * most]).filter(lambda text: len(text) >= least)


def drawn(model: type[Fields], other: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a schema's fields, each right, wrong or missing, and now and then others."""
    told = model.model_json_schema()
    fields = {n: right(f, told.get("$defs", {})) for n, f in told.get("properties", {}).items()}
    whole = st.fixed_dictionaries(fields)
    mixed = st.fixed_dictionaries({}, optional={name: one | other for name, one in fields.items()})
    one_wrong = st.tuples(whole, st.sampled_from([*fields, "x"]), other).map(lambda t: {**t[0], t[1]: t[2]})
    return st.one_of(
        whole, one_wrong, mixed, st.tuples(mixed, st.dictionaries(TEXT, other, max_size=2)).map(merged)
    )


def merged(parts: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return {**parts[1], **parts[0]}


ALL = st.one_of(
    [drawn(model, CONFIG).map(lambda v, m=model: (m, v)) for model in TEXTS]
    + [drawn(model, METRIC).map(lambda v, m=model: (m, v)) for model in NUMBERED]
)


@fuzz(3000, ALL)
def test_fields(drawn_fields: Any, folder: Path) -> None:
    model, values = drawn_fields
    told = checked(model, values, "bank").model_dump()
    assert values.keys() <= told.keys()
    for name, value in values.items():
        assert type(value) is not bool or name in ("answers", "weights")
        if isinstance(value, float) and not math.isfinite(value):
            assert name.startswith(("nll.", "rouge_l."))
            assert told[name] is None
        else:
            assert told[name] == (pytest.approx(value) if isinstance(value, int) else value)  # as a float
    json.dumps(told, allow_nan=False).encode()


CONFIGURED = parse_recipe("[data.silos]\n[method]\nname = 'fedavg'")
ADMISSION = Admission(FedAvg(), CONFIGURED, Server(Payload.empty(), {"bank": 8}, {"bank": None}, base="b", round=3))


def message(info: Any, metrics: Any) -> RecordDict:
    content = RecordDict()
    if info is not None:
        content["info"] = ConfigRecord(info)
    if metrics is not None:
        content["metrics"] = MetricRecord(metrics)
    return content


def replies(info: type[Fields], metrics: type[Fields]) -> st.SearchStrategy[RecordDict]:
    heading = drawn(info, CONFIG).map(lambda fields: {**fields, "client": "bank", "round": 3, "base": "b"})
    texts = st.none() | drawn(info, CONFIG) | heading.map(lambda f: {n: f[n] for n in info.model_fields if n in f})
    return st.builds(message, texts, st.none() | drawn(metrics, METRIC))


@fuzz(1500, replies(schema.Heading, schema.score_fields(STATES, answers=True)))
def test_evaluations(content: RecordDict, folder: Path) -> None:
    found = ADMISSION.scores("bank", content, answers=True)
    assert found.keys() == metrics_of(content).keys()
    json.dumps(found, allow_nan=False)


@fuzz(1500, replies(schema.TrainedHeading, schema.measure_fields(tuple(schema.MEASURES))))
def test_updates(content: RecordDict, folder: Path) -> None:
    content_of_round = dict(info_of(content)) if "info" in content.config_records else {}
    if content_of_round.get("round") == 3:
        content["info"] = ConfigRecord({**content_of_round, "round": 4})
    update = ADMISSION.update("bank", content)
    assert update.rows == 8
    json.dumps(dict(update.metrics), allow_nan=False)


@fuzz(1500, replies(schema.Joining, schema.NoNumbers))
def test_introductions(content: RecordDict, folder: Path) -> None:
    reply = Message(content, reply_to=Message(records({}), 1, "query.join"))
    error = error_of(reply)
    assert error is None or error.isprintable()
    one = Introduction.read(reply)
    assert 1 <= one.rows <= 2**31
    json.dumps(one.report, allow_nan=False)


class Silent:
    """A client that answers nothing: what reaches it was let through."""

    name = "bank"
    config = SimpleNamespace(federation=SimpleNamespace(rounds=3), compression=CompressionConfig())
    method = SimpleNamespace(total_rounds=lambda rounds: rounds + 1)
    last_round = 4
    observer = Observer()

    def __getattr__(self, name: str) -> Any:
        def asked(*given: Any, **named: Any) -> None:
            raise FederationError("it was asked", "it has no model", "none")

        return asked


KINDS = {
    "query.join": schema.Query,
    "query.initial": schema.InitialQuery,
    "train": schema.TrainRequest,
    "evaluate": schema.EvaluateRequest,
}


@fuzz(
    2000,
    st.one_of(
        [
            drawn(model, CONFIG).map(lambda fields, k=kind: (k, message(fields, None)))
            for kind, model in KINDS.items()
        ]
    ),
)
def test_requests(asked: Any, folder: Path) -> None:
    """A silo refuses what is not of the schema, and starts nothing for it."""
    kind, content = asked
    client: Any = Silent()
    with pytest.raises(FederationError) as caught:
        answer(kind, content, client)
    with clean_refusals():
        fields = fields_of(content, KINDS[kind], "server")
        known = 1 <= getattr(fields, "round", 1) <= 4
        assert caught.value.value == ("it was asked" if known else f"round {fields.round}")
        return
    assert caught.value.value.startswith("server ")
