"""The card tier's sections on one base: what a client does with it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from figures import Figure
from gpu_card import Card, section

from flexperts.client.model import ClientModel
from flexperts.communication.messages import encode, records
from flexperts.communication.traffic import personal_bytes
from flexperts.costs.speed import Workload, measure, set_up, train
from flexperts.data.batches import pad_responses
from flexperts.data.prompts import Example
from flexperts.evaluation.generation import prompt_batch
from flexperts.methods.registry import make_method
from flexperts.modeling.caches import read_prompts, response_losses
from flexperts.modeling.forward import autocast, hidden_states
from flexperts.parameters.store import PersonalMeta, PersonalStore
from flexperts.recipe import parse_recipe

BASE = (
    "A base of Qwen1.5-MoE-A2.7B's exact shape (24 layers, 60 experts of 1408, top-4) with random weights in bf16. "
)
LORA, WHOLE = "LoRA", "FLEx, trained copy"
METHODS = {
    LORA: ("method.name=fedavg",),
    WHOLE: ("method.name=flex",),
    "FLEx, rank 8": ("method.name=flex", "graft.rank=8"),
    "FLEx, two experts": ("method.name=flex", "graft.experts=2"),
    "FLEx, trained copy, checkpointing": ("method.name=flex", "training.gradient_checkpointing=true"),
}


def rows(count: int, length: int, response: int) -> list[Example]:
    """Return rows of random bytes, of slightly different lengths."""
    seeded = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 250, (length - i % 7,), generator=seeded).tolist() for i in range(count)]
    return [Example(tuple(tokens), len(tokens) - response) for tokens in drawn]


@section("Selecting experts on a card", BASE + "64 calibration rows of 160 tokens.", 60)
def selection(card: Card) -> Iterator[Figure]:
    """Selection over its own forward pass, and its memory."""
    config = parse_recipe("data.silos = {}", ["method.name=flex", "training.batch_size=4"])
    model, calibration = ClientModel(card.base, config, make_method(config.method)), rows(64, 160, 40)
    try:
        site = model.site("a", calibration)
        batches = [calibration[i : i + 4] for i in range(0, len(calibration), 4)]

        @torch.no_grad()
        def forward() -> None:
            with autocast(card.device, config.model.precision):
                for batch in batches:
                    padded = prompt_batch([e.input_ids for e in batch], _encoder(card))
                    hidden_states(card.base.model, padded.input_ids, padded.attention_mask)

        alone = card.seconds(forward, repeats=1, warm_up=1)
        whole = card.seconds(lambda: model.method.prepare(site), repeats=1, warm_up=1)
        yield Figure("selection in addition to its forward pass, in forward passes", whole / alone - 1, at_most=1)
        yield Figure("memory above the base", card.above(lambda: model.method.prepare(site)), "GB")
    finally:
        model.close()


@section(
    "Training step on a card",
    BASE + "4 rows of 256 tokens, LoRA of rank 8 on q, k and v, bf16 autocast.",
    110,
    "A frozen matrix costs two products in a step, a trained copy a third.",
)
def training(card: Card) -> Iterator[Figure]:
    """Seconds and peak of a step by method, and FLEx's over LoRA's."""
    work, seconds = Workload(rows=4, prompt=192, response=64, steps=10), {}
    for name, own in METHODS.items():
        ends, losses = [], []

        def ended(loss: float, _tokens: int, ends: list[float] = ends, losses: list[float] = losses) -> None:
            card.wait()
            ends.append(time.perf_counter())
            losses.append(loss)

        with set_up(card.base, own) as (model, split, config):
            assert split is not None
            steps = partial(train, model, split, config)
            peak = card.above(lambda: steps(work, ended))  # noqa: B023
            seconds[name] = median(after - before for before, after in pairwise(ends[2:]))
            yield Figure(f"{name}: a step", 1e3 * seconds[name], "ms")
            yield Figure(f"{name}: peak above the base", peak, "GB")
            yield Figure(f"{name}: losses that are not finite", sum(not math.isfinite(x) for x in losses), "", 0)
            if name in (LORA, WHOLE):
                yield from card.profiled(lambda: steps(replace(work, steps=1)), f"{name}, a step and its set-up")  # noqa: B023
    for name in ("FLEx, trained copy", "FLEx, rank 8"):
        yield Figure(f"time of a step: {name} over LoRA", seconds[name] / seconds[LORA], at_most=1.12)


@section("Decoding on a card", BASE + "Prompts of 128 tokens, then 8 tokens for every row; bf16 autocast.", 60)
def decoding(card: Card) -> Iterator[Figure]:
    """A token of a base with a graft over the base alone."""
    variants = {"base": None, WHOLE: METHODS[WHOLE]}
    for count in (1, 8, 32):
        work = Workload(rows=count, prompt=128, response=16, new_tokens=8, steps=1, repeats=3)
        alone, grafted = measure(card.base, work, variants)
        yield Figure(f"{count} rows, base: a token of all rows", 1e3 * alone.decode, "ms")
        yield Figure(
            f"{count} rows: tokens a second with a graft over without", alone.decode / grafted.decode, at_least=0.85
        )


@section(
    "A client's turn on a card",
    BASE + "What a turn takes outside its steps, with a trained copy in every layer.",
    60,
)
def turn(card: Card) -> Iterator[Figure]:
    """Seconds of each part of a turn."""
    with set_up(card.base, METHODS[WHOLE]) as (_model, split, _config), tempfile.TemporaryDirectory() as folder:
        assert split is not None
        store = PersonalStore(Path(folder) / "personal" / "a.safetensors", "base")
        store.path.parent.mkdir()
        meta = PersonalMeta("a", "base", 1, "", {}, {})
        yield Figure("personal state", sum(p.numel() * 4 for p in split.personal.values()) / 1e6, "MB")
        for what, call in {
            "write the personal state": lambda: store.save(split.personal, meta),
            "read it": lambda: store.load(1),
            "encode the shared part": lambda: encode(split),
            "search the message for personal bytes": lambda: personal_bytes(
                records({"client": "a"}, {}, encode(split)), split.personal
            ),
        }.items():
            yield Figure(f"seconds to {what}", card.seconds(call, repeats=1, warm_up=0), "s")


@section("Memory of scoring on a card", BASE + "The NLL of 32 rows: prompts of 144 tokens, responses of 256.", 40)
def evaluation(card: Card) -> Iterator[Figure]:
    """The peak above the base while responses are scored."""
    examples = rows(4 if card.tiny else 32, 400, 256)
    found = []

    @torch.no_grad()
    def score() -> None:
        with autocast(card.device, "bf16"):
            read = read_prompts(card.base.model, prompt_batch([e.prompt for e in examples], _encoder(card)))
            sums, _ = response_losses(card.base.model, read, pad_responses(examples, 0))
            found.append(int((~sums.isfinite()).sum()))

    yield Figure("peak above the base", card.above(score), "GB")
    yield Figure("rows whose NLL is not finite", found[-1], "", at_most=0)
    del card.base  # the next sections need its memory


def _encoder(card: Card) -> Any:
    return SimpleNamespace(tokenizer=card.base.tokenizer)
