"""Small messages that become large ones, and large ones: refused before anything in them is expanded."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexperts.communication import wire
from flexperts.communication.messages import Expected, info_of, payload_of, records
from flexperts.config.federation import CompressionConfig
from flexperts.config.run import RunConfig
from flexperts.errors import FederationError
from flexperts.parameters.vector import Manifest, Payload

from ..federation.scripted_grid import (  # noqa: TID252
    FOUR,
    START,
    Fault,
    ScriptedGrid,
    Watch,
    answered,
    bits,
    changed,
    expected,
    run_on,
    trio,
)

Recipe = Callable[..., RunConfig]
MIB = 1 << 20


@contextmanager
def within(most: int) -> Iterator[None]:
    """Fail if Python or NumPy hold more than so many bytes at any time inside the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def sends(arrays: dict[str, Any] | None = None, **info: Any) -> Fault:
    """Return a fault that sends other arrays, and texts in place of the manifest."""

    def fault(request: Message, reply: Message) -> list[Message]:
        content = reply.content
        if arrays is not None:
            content["shared"] = ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})
        kept = {n: v for n, v in content.config_records["info"].items() if n != "manifest"}
        content["info"] = ConfigRecord(kept | info)
        return [reply]

    return fault


def squeezed(text: bytes) -> bytes:
    """Return a list of a text many times, compressed: some 64 kB are 64 MB."""
    return zlib.compress(b"[" + text * (64 * MIB // len(text)) + b"]", 9)


HALF = {"values": np.zeros(START.size, np.float16)}
INT8 = {"values": np.zeros(START.size, np.int8), "scales": np.ones(1, np.float32)}
TOP = {"values": np.zeros(1, np.float16), "indices": np.zeros(1, np.uint32)}
MANIFESTS = {
    "names": squeezed(b'["a", [3]], '),
    "lists": squeezed(b"[],"),
    "white space": squeezed(b" "),
    "a shape of many sides": zlib.compress(b'[["a", [' + b"9," * 10**6 + b"9]]]"),
    "a side of many digits": zlib.compress(b'[["a", [' + b"9" * 10**6 + b"]]]"),
    "junk behind it": zlib.compress(START.manifest.to_json().encode()) + b"x" * 1000,
}
BOMBS: dict[str, Fault] = {
    "int8 with one block of 2 GB": sends(INT8, packing="int8", block=2**31),
    "int8 with another block": sends(INT8, packing="int8", block=START.size),
    "int8 with the usual block": sends(INT8, packing="int8", block=256),
    "fp16": sends(HALF, packing="fp16", exponent=0),
    "top_k": sends(TOP, packing="top_k", exponent=0),
    "a packing as bytes": sends(HALF, packing=b"fp16", exponent=0),
    **{f"manifest: {kind}": sends(manifest=manifest) for kind, manifest in MANIFESTS.items()},
    "a vector of 100 MB": sends({"shared": np.zeros(25 * MIB, np.float32)}, manifest=b""),
    "a text of 10 MB": changed(info={"base": "b" * 10 * MIB}),
    "a list of a million numbers": changed(metrics={"loss": [1.0] * 10**6}),
    "many names": changed(metrics={f"x{i}": 1 for i in range(10**5)}),
}


@pytest.mark.parametrize("packing", ["none", "fp16", "int8", "top_k"])
def test_bombs_as_updates(recipe: Recipe, tmp_path: Path, packing: str) -> None:
    """In each round b tries another one, which is right in size for no recipe or for another one."""
    kinds = [kind for kind in BOMBS if packing == "none" or (kind.startswith(("int8", "fp16", "top_k")))]
    kinds = [kind for kind in kinds if not kind.startswith(packing) or kind.endswith(("2 GB", "another block"))]
    grid, config = ScriptedGrid(*trio()), recipe(*FOUR, f"federation.rounds={len(kinds)}")
    a, _, c = trio()
    if packing == "none":
        grid.faults |= {("train", at, "b"): BOMBS[kind] for at, kind in enumerate(kinds, 1)}
        server, rounds = run_on(grid, config, tmp_path / "run")
        taken = [kind for kind, record in zip(kinds, rounds, strict=True) if [*record["refused"]] != ["b"]]
        assert taken == []
        assert "are expected here" in rounds[kinds.index("a vector of 100 MB")]["refused"]["b"]
        assert bits(server) == expected([(a, c)] * len(kinds)).tobytes()
        return
    wanted = Expected(START.manifest, START, CompressionConfig(kind=packing))  # type: ignore[arg-type]
    for kind in kinds:
        request = grid.create_message(RecordDict(), "train", 102, "1")
        content = records({"client": "b", "round": 1, "base": "x"}, {}, START)
        (message,) = BOMBS[kind](request, answered(request, content))
        with pytest.raises(FederationError, match=r"^b sent (packing|block)"), within(MIB):
            payload_of(message.content, "b", wanted)


def test_an_update_must_be_packed_as_the_recipe_says() -> None:
    wanted = Expected(START.manifest, START, CompressionConfig(kind="int8"))
    with pytest.raises(FederationError, match="b sent an update that is not packed: the recipe's is 'int8'"):
        payload_of(records({}, {}, START), "b", wanted)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_is_compared_and_not_parsed(kind: str) -> None:
    """Memory stays near the size of the expected manifest; without one, near a fixed limit."""
    content = records({}, {}, START)
    content.config_records["info"]["manifest"] = MANIFESTS[kind]
    for wanted, most in ((Expected(START.manifest, START, CompressionConfig()), MIB), (None, 80 * MIB)):
        with pytest.raises(FederationError, match=r"^b sent an array without a readable manifest"), within(most):
            payload_of(content, "b", wanted)


def test_an_expected_manifest_costs_no_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "from_json", None)
    payload = payload_of(records({}, {}, START), "b", Expected(START.manifest, START, CompressionConfig()))
    assert payload.manifest == START.manifest


def when_asked_for_weights(fault: Fault) -> Fault:
    """The silo's digest is honest."""
    return lambda request, reply: fault(request, reply) if info_of(request.content)["weights"] else [reply]


BIG = np.zeros(2 * MIB, np.float32)
STARTS: dict[str, Fault] = {
    "weights of 8 MiB": when_asked_for_weights(
        sends({"shared": BIG}, manifest=zlib.compress(b'[["a", [2097152]]]'))
    ),
    "weights of 8 MiB, unasked": sends({"shared": BIG}, manifest=zlib.compress(b'[["a", [2097152]]]')),
    **{f"manifest: {kind}": sends(manifest=manifest) for kind, manifest in MANIFESTS.items()},
}


@pytest.mark.parametrize("kind", STARTS)
def test_bombs_as_initial_weights(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    grid, watch = ScriptedGrid(*trio()), Watch()
    grid.faults["query.initial", 0, "a"] = STARTS[kind]
    server, _ = run_on(grid, recipe(*FOUR, "federation.max_message_bytes=1048576"), tmp_path / "run", watch)
    assert watch.refusals[0][0] == "a"
    assert ("raise federation.max_message_bytes" in watch.refusals[0][1]) == (kind == "weights of 8 MiB")
    assert server.round == 4


def test_bombs_as_introductions(recipe: Recipe, tmp_path: Path) -> None:
    grid, watch = ScriptedGrid(*trio()), Watch()
    faults = [
        changed(info={"report": json.dumps("x" * 5 * MIB)}),
        changed(info={"client": "b" * 10 * MIB}),
        sends({"shared": BIG}, manifest=b""),
        sends(note=b"x" * 10 * MIB),
    ]
    grid.faults["query.join", 0, "b"] = lambda request, reply: faults.pop(0)(request, reply)
    server, _ = run_on(grid, recipe(*FOUR, "federation.rounds=3"), tmp_path / "run", watch)
    assert faults == []
    assert sorted(server.clients) == ["a", "c"]
    assert all(len(reason) < 500 for _, reason in watch.refusals)
    assert any("are expected here" in reason for _, reason in watch.refusals)


def test_bombs_as_scores(recipe: Recipe, tmp_path: Path) -> None:
    grid = ScriptedGrid(*trio())
    faults = [
        sends({"shared": BIG}, manifest=b""),
        sends(note="x" * MIB),
        changed(metrics={"rouge_l.global": [1.0] * 10**6}),
        changed(metrics={f"x{i}": 1.0 for i in range(10**5)}),
    ]
    grid.faults |= {("evaluate", at, "b"): fault for at, fault in enumerate(faults, 1)}
    _, rounds = run_on(grid, recipe(*FOUR, "evaluation.every=1"), tmp_path / "run")
    assert [[*record["unscored"]] for record in rounds] == [["b"]] * 4
    assert "at most 65,536 are expected here" in rounds[1]["unscored"]["b"]


def test_one_tensor_under_many_names_on_the_socket() -> None:
    """The relay and the worker would copy it for every name."""
    content = RecordDict({"shared": ArrayRecord({"a": Array(np.zeros(1000, np.float32))})})
    message = wire.serialize({}, content)
    name = json.dumps([["a", "0"]])
    for items in ([["a", "0"], ["b", "0"]], []):
        text = json.dumps(items)
        pieces = json.dumps(name)[1:-1], json.dumps(text)[1:-1]
        header, length = message[8:], int.from_bytes(message[:8], "little")
        head = header[:length].replace(pieces[0].encode(), pieces[1].encode())
        assert head != header[:length]
        head += b" " * (-len(head) % 8)
        with pytest.raises(FederationError, match="a message between relay and worker"):
            wire.deserialize(len(head).to_bytes(8, "little") + head + header[length:])


def test_the_size_of_an_update_is_known_beforehand() -> None:
    payload = Payload(Manifest(("a",), ((1000,),)), np.zeros(1000, np.float32))
    assert Expected(payload.manifest, payload, CompressionConfig()).most == 4000 + len('[["a", [1000]]]') + 65536
