"""Keep the finished runs of an unfinished comparison in one small file without texts, to go on elsewhere.

    python benchmarks/keep_study.py pack runs/study-nineteen docs/results/study-nineteen/runs.tar.xz
    python benchmarks/keep_study.py unpack docs/results/study-nineteen/runs.tar.xz runs/study-nineteen

After the second command ``flexperts compare RECIPE --out runs/study-nineteen`` runs only what is missing. The file
holds recipes, scores, rounds and choices. A scored row is a hash of its text; ``unpack`` puts back the text of the
recipe's data, so that later runs can be compared row by row. Generated answers are not kept. Paths in the file are
relative to the repository; a recipe with a path outside of it is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flexperts.data.clients import load_clients
from flexperts.errors import ArtifactError, DataError
from flexperts.files import opened, read_lines, sealed, write_bytes
from flexperts.recipe import recorded_recipe
from flexperts.studies.finished import CLAIM, DONE, RUNS

HERE, PLACE = str(Path(__file__).resolve().parents[1]), "{repository}"
FILES = ("config.toml", "environment.json", "partition.json", "summary.json", "rounds.jsonl", "beyond.json", DONE)
FOLDERS = ("floor", "joined", "routing", "selection")


def pack(out: Path, file: Path) -> int:
    """Write the finished runs of a comparison's directory to one file; return their number."""
    contents = {CLAIM: _relocated(out / CLAIM, HERE, PLACE)}
    runs = _runs(out)
    for run in runs:
        kept = [run / name for name in FILES] + [p for name in FOLDERS for p in (run / name).glob("*.json*")]
        contents |= {str(p.relative_to(out)): _relocated(p, HERE, PLACE) for p in kept if p.exists()}
        joined = {path.stem for path in (run / "joined").glob("*.json")}  # of these, no row is read again
        for path in [path for path in (run / "predictions").glob("*.jsonl") if path.stem not in joined]:
            lines = [{"row": _digest(row), "scores": row["scores"]} for row in read_lines(path)]
            contents[str(path.relative_to(out))] = _json_lines(lines)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())
    return len(runs)


def unpack(file: Path, out: Path) -> int:
    """Write the runs of a file into a comparison's new directory; return their number."""
    if out.exists():
        raise ArtifactError(f"{out}", "it exists already", "name a new directory, or go on in this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as begun:  # what cannot be finished leaves nothing that looks finished
        count = _restore(file, Path(begun) / out.name)
        (Path(begun) / out.name).rename(out)
    return count


def _restore(file: Path, out: Path) -> int:
    with tarfile.open(file) as archive:
        archive.extractall(out, filter="data")
    for path in [path for path in out.rglob("*") if path.is_file()]:
        write_bytes(path, _relocated(path, PLACE, HERE))
    known: dict[str, dict[str, dict[str, Any]]] = {}
    runs = _runs(out)
    for run in runs:
        recipe = recorded_recipe(run)
        of_data = f"{recipe.seed} {recipe.data.model_dump_json()}"
        if of_data not in known:
            clients = load_clients(recipe.data, recipe.seed).values()
            texts = [row.texts for client in clients for row in (*client.test, *client.validation)]
            known[of_data] = {_digest(each): each for each in texts}
        for path in (run / "predictions").glob("*.jsonl"):
            lines = read_lines(path)
            if any(line["row"] not in known[of_data] for line in lines):
                raise DataError(f"{path}: a scored row", "the recipe's data does not have it", "restore the data")
            write_bytes(path, _json_lines([known[of_data][x.pop("row")] | x for x in lines]))
    return len(runs)


def _runs(out: Path) -> list[Path]:
    return sorted(mark.parent for mark in (out / RUNS).glob(f"*/*/{DONE}"))


def _relocated(path: Path, old: str, new: str) -> bytes:
    """Return a file's content with one folder in place of another; a record gets a new checksum."""
    content = path.read_bytes()
    if path.suffix == ".toml":
        text = _moved(content.decode(), old, new)
        _check_placed(path, tomllib.loads(text), new)
        return text.encode()
    if path.suffix != ".json":
        return content
    record = json.loads(content)
    moved = _moved(record, old, new)
    if path.name == CLAIM:
        _check_placed(path, [tomllib.loads(moved["recipe"]), moved["entries"]], new)
    if moved == record:
        return content
    if "sha256" in record:
        opened(path, record)
        moved = sealed({key: value for key, value in moved.items() if key != "sha256"})
    return json.dumps(moved, indent=2).encode()


def _moved(value: Any, old: str, new: str) -> Any:
    """Return a JSON value in which every path in ``old`` is one in ``new``, also inside of a recipe's text."""
    if isinstance(value, Mapping):
        return {key: _moved(its, old, new) for key, its in value.items()}
    if isinstance(value, list):
        return [_moved(its, old, new) for its in value]
    return re.sub(f"{re.escape(old)}(?=$|[/\"'])", lambda _: new, value) if isinstance(value, str) else value


def _check_placed(path: Path, value: Any, new: str) -> None:
    """Refuse a recipe that is to be packed with a path outside of the repository: it names a machine's folder."""
    if new != PLACE:
        return
    if isinstance(value, Mapping | list):
        for its in value.values() if isinstance(value, Mapping) else value:
            _check_placed(path, its, new)
    elif isinstance(value, str) and Path(value.rpartition("=")[2].strip(" \"'")).is_absolute():
        raise ArtifactError(
            f"{path}: {value}", "this path is outside of the repository", "put the data inside of it"
        )


def _digest(row: Mapping[str, Any]) -> str:
    texts = [row["instruction"], row["context"], row["response"], row.get("before")]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()


def main() -> None:
    """Pack or unpack the finished runs of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    count = {"pack": pack, "unpack": unpack}[asked.what](asked.source, asked.target)
    print(f"{asked.target}: {count} finished runs")


if __name__ == "__main__":
    main()
