"""Throughput of the serving engine: eight clients in one batch against eight requests of one client.

    python benchmarks/serving_throughput.py --out runs/serving                    # smol-moe, a few minutes
    python benchmarks/serving_throughput.py --out runs/serving --repeats 9 --new-tokens 64
    python benchmarks/serving_throughput.py --out runs/tiny --set model.base=DIR --repeats 1

Makes a short FLEx run of eight clients for every variant (kept under --out, and used again from there), then lets
three kinds of batches of the same prompts take turns: a row of every client; all rows of one client; and all rows
of one client on the base as evaluation sets it up, with PEFT's adapter and the client's own hooks. Answers do not
end before their limit here, so that all batches do the same work. Results are medians; ratios are medians over
turns, by processor time as well, which other processes on the machine disturb less. Then counts the answers that
are the same in a mixed batch as elsewhere. Writes serving.json.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flexperts.data.silos.generate import write_silos
from flexperts.engines.run import run_federation
from flexperts.environment import environment
from flexperts.evaluation.generation import prompt_batch
from flexperts.files import write_json
from flexperts.finished.trained import TrainedRun
from flexperts.modeling.forward import autocast, next_logits
from flexperts.recipe import parse_recipe
from flexperts.serving.contract import ModelName, Sampling
from flexperts.serving.engine.batch import Batch, RequestState
from flexperts.serving.engine.decoding import Decoding
from flexperts.serving.engine.lanes import Lane, Lanes, OwnLane

VARIANTS: dict[str, tuple[str, ...]] = {
    "whole experts, bf16": (),
    "rank 8, bf16": ("graft.rank=8",),
    "whole experts, fp32": ("model.dtype=float32", "model.precision=fp32"),
}
RECIPE = """
[training]
local_steps = {steps}
batch_size = 2
personal_lr = 6e-3
[federation]
rounds = 1
[evaluation]
rows = 1
max_new_tokens = 4
"""
MIXED, SINGLE, ORDINARY = "eight clients", "one client", "one client, ordinary"


def trained_run(folder: Path, settings: Sequence[str], steps: int) -> TrainedRun:
    """Return a finished run of eight clients: the silos that ship, of two seeds."""
    out = folder / "run"
    if not (out / "summary.json").exists():
        text = RECIPE.format(steps=steps)
        for seed in (0, 1):
            for path in write_silos(folder / f"silos-{seed}", seed, 16, 4):
                if path.name == "train.jsonl":
                    name = f"{path.parent.name}_{seed}"
                    text += f'[data.clients.{name}]\ntrain = "{path}"\ntest = "{path.parent / "test.jsonl"}"\n'
        run_federation(parse_recipe(text, settings), out)
    return TrainedRun(out)


def rows_of(
    trained: TrainedRun, clients: Sequence[str], prompts: Sequence[Sequence[int]], limit: int
) -> list[RequestState]:
    """Return requests that take ``limit`` tokens whatever these are."""
    tokenizer, sampling = trained.workspace.encoder.tokenizer, Sampling(limit)
    return [
        RequestState(
            ModelName(client, "personalized"),
            prompt,
            Decoding(tokenizer, (), sampling),
            len(prompt) + limit,
            lambda _: None,
        )
        for client, prompt in zip(clients, prompts, strict=True)
    ]


def timed(trained: TrainedRun, lane: Lane, rows: list[RequestState]) -> dict[str, float]:
    """Answer rows together; return the seconds of reading the prompts and of all further tokens, by two clocks."""
    base, encoder, precision = trained.model.base.model, trained.workspace.encoder, trained.config.model.precision
    with lane.opened():
        batch = Batch(base, lane, encoder, precision)
        marks = [_clocks()]
        batch.add(rows)
        marks.append(_clocks())
        while batch.rows:
            batch.step()
        marks.append(_clocks())
    (wall, cpu), (read, read_cpu), (end, end_cpu) = marks
    seconds = {"prefill": read - wall, "decode": end - read, "whole": end - wall}
    return seconds | {"prefill cpu": read_cpu - cpu, "decode cpu": end_cpu - read_cpu, "whole cpu": end_cpu - cpu}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def throughput(trained: TrainedRun, lanes: dict[ModelName, Lane], repeats: int, limit: int) -> dict[str, Any]:
    """Let the three kinds of batches take turns; return their speeds, and the mixed one's over the others'."""
    clients, prompts = trained.clients, test_prompts(trained)
    found: dict[str, list[dict[str, float]]] = {MIXED: [], SINGLE: [], ORDINARY: []}
    for repeat in range(-1, repeats):  # the first turn warms up
        one = clients[repeat % len(clients)]
        mixed, own = lanes[ModelName(one, "personalized")], OwnLane(trained, ModelName(one, "personalized"))
        for name, lane, owners in (
            (MIXED, mixed, clients),
            (SINGLE, mixed, [one] * len(clients)),
            (ORDINARY, own, [one] * len(clients)),
        ):
            seconds = timed(trained, lane, rows_of(trained, owners, prompts, limit))
            if repeat >= 0:
                found[name].append(seconds)
    tokens = {
        "prefill": sum(map(len, prompts)),
        "decode": len(clients) * (limit - 1),
        "whole": len(clients) * limit,
    }
    speeds = {
        name: {part: count / median(turn[part] for turn in turns) for part, count in tokens.items()}
        for name, turns in found.items()
    }
    ratios = {
        f"{MIXED} / {name}": {
            part: median(theirs[part] / ours[part] for ours, theirs in zip(found[MIXED], found[name], strict=True))
            for part in found[MIXED][0]
        }
        for name in (SINGLE, ORDINARY)
    }
    return {"prompt_tokens": tokens["prefill"], "tokens_per_s": speeds, "ratios": ratios}


def test_prompts(trained: TrainedRun) -> list[list[int]]:
    """Return one prompt of every client."""
    rows = [trained.workspace.clients[client].test[0] for client in trained.clients]
    return [trained.workspace.encoder.prompt(row.instruction, row.context) for row in rows]


def sameness(trained: TrainedRun, lanes: dict[ModelName, Lane], limit: int) -> dict[str, Any]:
    """Count answers of a mixed batch that are equal elsewhere; a batch of one client shows what rounding does."""
    clients, prompts = trained.clients, test_prompts(trained)
    mixed = lanes[ModelName(clients[0], "personalized")]

    def answers(lane: Lane, names: Sequence[str], asked: Sequence[Sequence[int]]) -> list[list[int]]:
        rows = rows_of(trained, names, asked, limit)
        timed(trained, lane, rows)
        return [row.answer.tokens for row in rows]

    together = answers(mixed, clients, prompts)
    alone = [answers(mixed, [c], [p])[0] for c, p in zip(clients, prompts, strict=True)]
    same_shape = [answers(mixed, [c] * len(clients), prompts)[n] for n, c in enumerate(clients)]
    one = OwnLane(trained, ModelName(clients[0], "personalized"))
    of_one = answers(one, clients[:1] * len(clients), prompts)
    of_one_alone = [answers(one, clients[:1], [p])[0] for p in prompts]
    logits = first_logits(trained, mixed, rows_of(trained, clients, prompts, 1))
    single = [
        first_logits(trained, mixed, rows_of(trained, [c], [p], 1)) for c, p in zip(clients, prompts, strict=True)
    ]
    return {
        "answers": len(clients),
        "mixed batch = one request at a time": _equal(together, alone),
        "mixed batch = batch of the same shape, of one client": _equal(together, same_shape),
        "ordinary batch of one client = one request at a time": _equal(of_one, of_one_alone),
        "largest difference of first logits": (logits - torch.cat(single)).abs().max().item(),
    }


def _equal(left: Sequence[list[int]], right: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


@torch.no_grad()
def first_logits(trained: TrainedRun, lane: Lane, rows: list[RequestState]) -> torch.Tensor:
    """Return the logits ``[B, V]`` of the rows' first tokens."""
    prompts = prompt_batch([row.prompt for row in rows], trained.workspace.encoder)
    with lane.opened(), autocast(torch.device("cpu"), trained.config.model.precision):
        lane.select([row.model for row in rows])
        return next_logits(trained.model.base.model, prompts.input_ids, prompts.attention_mask)[0]


def measure(folder: Path, settings: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """Return one variant's figures."""
    trained = trained_run(folder, settings, given.steps)
    lanes = dict(Lanes(trained))  # all are loaded
    found = throughput(trained, lanes, given.repeats, given.new_tokens)
    found["sameness"] = sameness(trained, lanes, given.new_tokens)
    trained.close()
    return {"settings": list(settings), **found}


def main() -> None:
    """Measure all variants, print their ratios, write serving.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=2, help="training steps of every client")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    given = parser.parse_args()
    options = {"repeats": given.repeats, "new_tokens": given.new_tokens, "threads": torch.get_num_threads()}
    variants: dict[str, Any] = {}
    for name in given.only:
        folder = given.out.resolve() / re.sub(r"\W+", "-", name)
        variants[name] = measure(folder, [*VARIANTS[name], *given.settings], given)
        print(name, variants[name]["ratios"], variants[name]["sameness"], flush=True)
        found = {**options, "environment": environment(), "variants": variants}
        write_json(given.out / "serving.json", found)


if __name__ == "__main__":
    main()
