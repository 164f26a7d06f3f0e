"""Malformed states, run files and data files: a clean refusal, or what was written."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import PLAIN, TEXT, fuzz, mutated
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save

from flexperts.artifacts import RunDirectory
from flexperts.checked_file import write_sealed
from flexperts.config.data import ClientFiles, DataConfig
from flexperts.data.clients import load_clients
from flexperts.data.sources import read_source
from flexperts.errors import DataError
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.store import PersonalMeta, PersonalStore, load_personal, save_personal
from flexperts.parameters.vector import Payload
from flexperts.recipe import parse_recipe
from flexperts.server.checkpoint import load_server, save_server

META = PersonalMeta("bank", "b" * 64, 3, "s" * 64, {"model.layers.0": (2, 0)}, {"model.layers.0": [0.1, 2.0]})
TENSORS = {"graft.up": torch.arange(6.0).reshape(2, 3), "graft.half": torch.ones(3).bfloat16()}
SERVER = Server(
    Payload.of({"a": torch.arange(3.0)}), {"bank": 8}, {"bank": None}, None, 3, {"m.a": torch.ones(2)}, 1
)


def written(write: Any) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


PERSONAL = written(lambda path: save_personal(path, TENSORS, META))
CHECKPOINT = written(lambda path: save_server(path, SERVER))


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in expected.items()
    )


@fuzz(800, mutated(PERSONAL))
def test_mutated_personal_states(content: bytes, folder: Path) -> None:
    path = folder / "bank.safetensors"
    path.write_bytes(content)
    tensors, meta = load_personal(path)
    assert meta == META
    assert same(tensors, TENSORS)
    PersonalStore(path, META.base).load(3)


@fuzz(800, mutated(CHECKPOINT))
def test_mutated_checkpoints(content: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(content)
    server = load_server(folder / "x")
    assert server.shared.vector.tolist() == [0, 1, 2]
    assert (server.round, server.clients, server.seed) == (3, {"bank": 8}, 1)
    assert same(server.memory, SERVER.memory)


KINDS = st.sampled_from(["flexperts-personal-2", "flexperts-server-2", "flexperts-personal-1", "x"])
HEADERS = st.one_of(PLAIN, st.fixed_dictionaries({"meta": PLAIN.map(json.dumps) | PLAIN, "sha256": PLAIN})).map(
    json.dumps
)


@fuzz(300, st.dictionaries(KINDS, HEADERS | TEXT, max_size=2))
def test_foreign_headers(header: dict[str, str], folder: Path) -> None:
    (folder / "x").write_bytes(save({"a": torch.ones(2)}, metadata=header))
    for read in (load_personal, load_server):
        try:
            read(folder / "x")
        except ValueError as error:
            assert "x: it is" in str(error)  # noqa: PT017
        else:
            raise AssertionError(header)


@fuzz(700, st.tuples(st.dictionaries(st.sampled_from([*asdict(META)]) | TEXT, PLAIN, max_size=3), KINDS))
def test_whole_files_with_wrong_metadata(drawn: Any, folder: Path) -> None:
    fields, kind = drawn
    rest = {"round": 1, "clients": {"bank": 1}, "reports": {}, "agreement": None, "seed": 0}
    base: Any = rest if "server" in kind else asdict(META)
    write_sealed(folder / "x", kind, {"shared/a": torch.ones(2)}, base | fields)
    server_or_state = load_server(folder / "x") if "server" in kind else load_personal(folder / "x")
    assert server_or_state is not None


ROUND = {"number": 1, "clients": {"bank": {"loss": 0.5}}, "scores": {}, "seconds": {"training": 0.1}}
SUMMARY = {"method": "flex", "clients": {"bank": {}}, "seed": 0}


def run_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder), parse_recipe("[data.silos]").to_toml())
        run.append_round(ROUND)
        run.append_round(ROUND | {"number": 2})
        run.write_summary(SUMMARY)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


FILES = run_files()
PIECES = st.one_of(st.binary(max_size=60), PLAIN.map(lambda v: json.dumps(v).encode()), st.just(b"[" * 100_000))


@fuzz(1000, st.sampled_from(sorted(FILES)).flatmap(lambda n: st.tuples(st.just(n), mutated(FILES[n]) | PIECES)))
def test_run_directories(drawn: Any, folder: Path) -> None:
    name, content = drawn
    for other, whole in FILES.items():
        (folder / other).write_bytes(content if other == name else whole)
    run = RunDirectory.open(folder)
    read = [
        run.rounds, lambda: run.finished_rounds(2), lambda: run.summary(checked=True), run.summary, run.environment,
        lambda: parse_recipe(run.config_toml, where="config.toml"), lambda: run.keep_rounds(1),
    ]  # fmt: skip
    expected = {1: [ROUND, ROUND | {"number": 2}], 2: SUMMARY}
    for number, one in enumerate(read):
        try:
            found = one()
        except ValueError as error:
            if not hasattr(error, "remedy"):
                raise
        else:
            assert found == expected.get(number, found)


JSONL = b'{"instruction": "Add", "context": "1 and 1", "response": "2", "category": "sums"}\n' * 2
CSV = b'instruction,context,response,category\nAdd,1 and 1,2,sums\n"a,b",,c,d\n'
JSON = b'[{"instruction": "Add", "response": "2"}, {"instruction": "Sub", "response": "0", "passage": "p"}]'
ROWS = st.dictionaries(st.sampled_from(["instruction", "response", "context", "category", "passage"]) | TEXT, PLAIN)
ENDINGS = {
    ".jsonl": JSONL,
    ".jsonl.gz": gzip.compress(JSONL),
    ".csv": CSV,
    ".tsv": CSV.replace(b",", b"\t"),
    ".json": JSON,
    ".parquet": b"PAR1" + b"\0" * 20 + b"PAR1",
}
SOURCES = st.sampled_from(sorted(ENDINGS)).flatmap(
    lambda ending: st.tuples(
        st.just(ending),
        st.one_of(
            mutated(ENDINGS[ending]),
            st.binary(max_size=80),
            st.lists(ROWS, max_size=3).map(lambda rows: json.dumps(rows).encode()),
            st.lists(ROWS, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
            st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-8-sig"]).map(lambda c: JSONL.decode().encode(c)),
            st.sampled_from(
                [b"[" * 100_000, b"9" * 6000, b'{"a":' * 50_000, b"x," * 200_000, b'"' + b"y" * 200_000]
            ),
            st.just(b'{"instruction": "\\ud800", "response": "x"}'),
        ),
    )
)
COLUMNS = st.dictionaries(st.sampled_from(["instruction", "response", "category"]), TEXT, max_size=1)


@fuzz(1500, st.tuples(SOURCES, COLUMNS, st.none() | TEXT, st.sampled_from(["refuse", "drop"])))
def test_data_files(drawn: Any, folder: Path) -> None:
    (ending, content), columns, passage, on_bad_row = drawn
    (folder / f"rows{ending}").write_bytes(content)
    path = str(folder / f"rows{ending}")
    for row in read_source(path, columns, passage=passage, on_bad_row=on_bad_row):
        assert row.instruction.strip()
        assert row.response.strip()
        assert row.passage
        "".join((row.instruction, row.context, row.response, row.category, row.passage)).encode()


@fuzz(500, st.tuples(TEXT, TEXT, st.none() | TEXT))
def test_names_and_paths_of_data(drawn: Any, folder: Path) -> None:
    name, train, test = drawn
    (folder / "rows.jsonl").write_bytes(JSONL)
    if not train:
        with pytest.raises(ValidationError, match="it is required"):
            DataConfig(clients={name: ClientFiles(train=train)})
    for source in filter(None, (train, "rows.jsonl", f"{train}/rows.jsonl")):
        with patch("datasets.load_dataset", side_effect=OSError("no network")) as hub:
            try:
                load_clients(DataConfig(clients={name: ClientFiles(train=source, test=test or "rows.jsonl")}), 0)
            except DataError:
                assert all(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", call.args[0]) for call in hub.call_args_list)
                raise
