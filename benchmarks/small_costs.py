"""The cost of two small operations: decoding an answer piece by piece, and checking a base's weights before a run.

    python benchmarks/small_costs.py

Answers: a token at a time, by ``serving.engine.decoding`` and by decoding all tokens so far after each one, in
turns. Weights: ``parameters.finite`` over float32 and bfloat16 weights, compared with one sum over the same.
Medians of five.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from flexperts.parameters.finite import first_not_finite
from flexperts.serving.contract import Sampling
from flexperts.serving.engine.decoding import Decoding
from flexperts.testing import byte_tokenizer

TOKENS = (1000, 2000, 4000)
TIMES = 5
GIGABYTE = 1_000_000_000


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    ids = tokenizer("The quick brown fox. " * 200)["input_ids"]
    print("tokens   pieces   whole text each time   ratio")
    for count in TOKENS:
        pieces, whole = in_turns(
            lambda n=count: by_pieces(tokenizer, ids[:n]), lambda n=count: anew(tokenizer, ids[:n])
        )
        print(f"{count:6}  {pieces:6.3f} s   {whole:18.3f} s   {whole / pieces:5.0f}")
    print("weights    look, s/GB   sum, s/GB")
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ParameterList([nn.Parameter(torch.ones(4, 1000, 10_000, dtype=dtype)) for _ in range(4)])
        size = sum(p.numel() * p.element_size() for p in model) / GIGABYTE
        look, total = in_turns(lambda m=model: first_not_finite(m), lambda m=model: [p.sum() for p in m])
        print(f"{str(dtype).removeprefix('torch.'):9}  {look / size:10.2f}   {total / size:9.2f}")


def by_pieces(tokenizer: object, ids: list[int]) -> None:
    """Feed an answer's tokens as the engine does."""
    answer = Decoding(tokenizer, {257}, Sampling(len(ids) + 1))
    for token in ids:
        answer.take(token)


def anew(tokenizer: object, ids: list[int]) -> None:
    """Decode the whole answer after each of its tokens."""
    for end in range(1, len(ids) + 1):
        tokenizer.decode(ids[:end], skip_special_tokens=True)  # type: ignore[attr-defined]


def in_turns(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of two pieces of work that take turns."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(TIMES):
        for seconds, work in zip(spent, (one, other), strict=True):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return median(spent[0]), median(spent[1])


if __name__ == "__main__":
    main()
