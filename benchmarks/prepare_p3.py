"""Short P3 tasks as one folder per client: the paper's pathological split (one task category each) in small.

    python benchmarks/prepare_p3.py SOURCE data/p3

SOURCE holds closed_qa, information_extraction, classification, summarization and general, each a .jsonl file,
with the fields instruction, context, response, dataset and split (train or test, divided by passage); general.jsonl
holds tasks that no client trains on. Rows with long prompts or answers are left out, so that a run takes minutes on
a CPU; of the rest, an even share of every data set is drawn, with a fixed seed.

The pool for mixtures holds none of the split's train rows, because rates are chosen on validation rows, which are
drawn from those; its prompts may be longer, since few closed questions with short ones are left. It has one row per
passage: its rows become train and test rows of any client, and no client may train on a tested passage.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIENTS = ("classification", "closed_qa", "information_extraction", "summarization")
Row = dict[str, Any]
_PASSAGE = re.compile(r"(?:Context|Process):(.*?)(?:Question:|$)", re.DOTALL)


def short_rows(path: Path, split: str, longest_prompt: int, longest_answer: int) -> list[Row]:
    """Return a file's rows of a split whose prompt and answer are short enough, in characters."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [
        row
        for row in rows
        if row["split"] == split
        and len(row["instruction"]) + len(row["context"]) < longest_prompt
        and len(row["response"]) < longest_answer
    ]


def passage(row: Row) -> str:
    """Return the passage that a prompt asks about, if it names one, else the prompt."""
    found = _PASSAGE.search(row["instruction"])
    return (found[1] if found else row["instruction"]).strip()


def one_per_passage(rows: Sequence[Row], taken: Sequence[Row]) -> list[Row]:
    """Return rows whose passage occurs in no earlier row, and is not among the taken ones."""
    first = {passage(row): row for row in reversed([*taken, *rows])}
    return [row for row in rows if first[passage(row)] is row]


def draw(rows: Sequence[Row], count: int) -> list[Row]:
    """Return at most ``count`` rows, taking the data sets in turn."""
    piles: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        piles[row["dataset"]].append(row)
    stream = random.Random(0)
    for pile in piles.values():
        stream.shuffle(pile)
    drawn: list[Row] = []
    while len(drawn) < count and any(piles.values()):
        drawn += [pile.pop() for _, pile in sorted(piles.items()) if pile]
    return drawn[:count]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines and say how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Write every client's train.jsonl and test.jsonl, pool.jsonl of other rows, and general.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=120, help="most train rows per client")
    parser.add_argument("--test", type=int, default=100, help="most test rows per client")
    parser.add_argument("--prompt", type=int, default=500, help="prompts are shorter than this, in characters")
    parser.add_argument("--answer", type=int, default=200, help="answers are shorter than this, in characters")
    parser.add_argument("--pool", type=int, default=160, help="most rows of each client's task in the pool")
    parser.add_argument("--pool-prompt", type=int, default=700, help="prompts in the pool are shorter than this")
    wanted = parser.parse_args()
    pool: list[Row] = []
    for client in CLIENTS:
        source = wanted.source / f"{client}.jsonl"
        drawn = {}
        for split, count in (("train", wanted.train), ("test", wanted.test)):
            drawn[split] = draw(short_rows(source, split, wanted.prompt, wanted.answer), count)
            write(wanted.out / client / f"{split}.jsonl", drawn[split])
        rows = [row for split in drawn for row in short_rows(source, split, wanted.pool_prompt, wanted.answer)]
        pool += draw(one_per_passage(rows, drawn["train"]), wanted.pool)
    write(wanted.out / "pool.jsonl", pool)
    general = short_rows(wanted.source / "general.jsonl", "test", wanted.prompt, wanted.answer)
    write(wanted.out / "general.jsonl", draw(general, wanted.test))


if __name__ == "__main__":
    main()
