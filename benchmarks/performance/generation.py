"""Answers for evaluation: batch sizes against `model.generate`, and evaluation against training in the quick start.

    python benchmarks/performance/generation.py                               # about three and a half minutes
    python benchmarks/performance/generation.py --repeats 1 --set data.silos.train_rows=8        # a trial

Runs one round of the quick start's FLEx part, and takes evaluation's seconds and the round's from its summary. Then
one client's personalized model answers test prompts of all silos, in batches of every size in turn, beside
`model.generate` in batches of one and of the recipe's size; and it scores and answers its own rows beside the plain
way to do both: a pass over prompt and response, then `model.generate`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import ROOT, Benchmark, Figure, parser
from transformers import GenerationConfig

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import PromptEncoder
from flexperts.engines.run import run_federation
from flexperts.evaluation.generation import end_tokens, generate, longest_first, prompt_batch
from flexperts.evaluation.scores import EvaluationSettings, evaluate, rouge_l
from flexperts.finished.trained import TrainedRun
from flexperts.modeling.forward import Precision, autocast, token_losses
from flexperts.recipe import load_recipe

RECIPE = ROOT / "recipes" / "quickstart.toml"
SIZES = (1, 4, 8, 16, 32)
PROMPTS = {1: 8, 4: 16}
"""Number of prompts for a batch size: fewer for slow sizes, spread over all silos."""
MOST = 32

Rows = Sequence[Sequence[int]]
Times = dict[str, list[float]]


class Plain:
    """Greedy answers by transformers' `model.generate`, in batches sorted by length.

    Args:
        model, encoder, precision, limit: As evaluation uses them.
    """

    def __init__(self, model: Any, encoder: PromptEncoder, precision: Precision, limit: int) -> None:
        self.model, self.encoder, self.precision, self.limit = model, encoder, precision, limit
        self.config = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=encoder.tokenizer.pad_token_id,
            eos_token_id=end_tokens(model, encoder),
        )

    @torch.no_grad()
    def answers(self, prompts: Rows, batch_size: int) -> list[str]:
        """Answer prompts, in their order."""
        found = [""] * len(prompts)
        for chosen in longest_first(prompts, batch_size):
            batch = prompt_batch([prompts[i] for i in chosen], self.encoder)
            with autocast(torch.device("cpu"), self.precision):
                output = self.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=self.config,
                )
            new = output[:, batch.input_ids.shape[1] :]
            for index, text in zip(
                chosen, self.encoder.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                found[index] = text.strip()
        return found

    @torch.no_grad()
    def evaluation(self, rows: Sequence[Any], batch_size: int) -> list[str]:
        """Score every row's response in a separate pass, then answer the prompts."""
        examples = self.encoder.encode_all(rows)
        for chosen in longest_first([e.input_ids for e in examples], batch_size):
            batch = pad_batch([examples[i] for i in chosen], self.encoder.tokenizer.pad_token_id)
            with autocast(torch.device("cpu"), self.precision):
                token_losses(self.model, batch)
        found = self.answers([e.prompt for e in examples], batch_size)
        rouge_l(found, [row.response for row in rows])
        return found


def in_turn(tasks: dict[str, Callable[[], list[str]]], repeats: int) -> tuple[Times, dict[str, list[str]]]:
    """Let tasks take turns; return each one's seconds by turn, and its answers."""
    seconds: Times = {name: [] for name in tasks}
    answers: dict[str, list[str]] = {}
    for turn in range(repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            answers[name] = task()
            seconds[name].append(round(time.perf_counter() - started, 3))
            print(f"turn {turn + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds, answers


def sweep(plain: Plain, prompts: Rows, repeats: int, default: int) -> dict[str, Any]:
    """Return tokens per second of answers, by way and batch size."""
    model, encoder = plain.model, plain.encoder

    def ours(size: int) -> Callable[[], list[str]]:
        return lambda: generate(
            model,
            encoder,
            some(prompts, size),
            max_new_tokens=plain.limit,
            batch_size=size,
            precision=plain.precision,
        )

    tasks = {f"batch {size}": ours(size) for size in SIZES}
    for size in (1, default):
        tasks[f"model.generate, batch {size}"] = lambda size=size: plain.answers(some(prompts, size), size)
    seconds, answers = in_turn(tasks, repeats)
    tokens = {name: sum(map(len, encoder.tokenizer(texts)["input_ids"])) for name, texts in answers.items()}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": {name: tokens[name] / median(taken) for name, taken in seconds.items()},
        "same_answers": answers[f"batch {default}"] == answers[f"model.generate, batch {default}"],
    }


def some(prompts: Rows, size: int) -> Rows:
    """Return the prompts that a batch size is tried on."""
    return prompts[:: len(prompts) // min(len(prompts), PROMPTS.get(size, MOST))]


def together(plain: Plain, rows: Sequence[Any], repeats: int, batch_size: int) -> dict[str, Any]:
    """Return seconds of scoring and answering one client's rows: prompts read once, and the plain way."""
    settings = EvaluationSettings(plain.limit, batch_size, plain.precision)
    ways: dict[str, Callable[[], list[str]]] = {
        "prompts read once": lambda: list(evaluate(plain.model, plain.encoder, rows, settings).predictions),
        "plain": lambda: plain.evaluation(rows, batch_size),
    }
    seconds, answers = in_turn(ways, repeats)
    return {"seconds": seconds, "same_answers": answers["prompts read once"] == answers["plain"]}


def measure(run: TrainedRun, repeats: int) -> dict[str, Any]:
    """Return what one client's personalized model takes."""
    client, encoder = run.client(run.clients[0]), run.workspace.encoder
    wanted = run.config.evaluation
    by_silo = zip(*(run.client(name).scored_rows for name in run.clients), strict=False)
    prompts = [encoder.encode(row).prompt for rows in by_silo for row in rows][:MOST]
    with client.in_state(run.request(client.name), "personalized") as (model, _):
        plain = Plain(model, encoder, run.config.model.precision, wanted.max_new_tokens)
        generate(model, encoder, prompts[:4], max_new_tokens=2, batch_size=4, precision=plain.precision)  # warms up
        found = sweep(plain, prompts, repeats, wanted.batch_size)
        return {**found, "evaluation": together(plain, client.scored_rows, repeats, wanted.batch_size)}


def quick_start(settings: Sequence[str], folder: Path) -> tuple[TrainedRun, dict[str, float]]:
    """Run one round; return the run, and the seconds of its evaluation and of as many rounds as the recipe has."""
    overrides = ["method.reference=", "federation.rounds=1", *settings]
    summary = run_federation(load_recipe(RECIPE, overrides), folder / "run")
    rounds = load_recipe(RECIPE).federation.rounds
    taken = summary["seconds"]
    return TrainedRun(folder / "run"), {
        "evaluation": taken["evaluation"],
        "round": taken["training"],
        "rounds": rounds,
        "training": rounds * taken["training"],
    }


def figures(seconds: dict[str, float], found: dict[str, Any], default: int) -> list[Figure]:
    """Return the page's figures."""
    speeds, whole = found["tokens_per_s"], found["evaluation"]["seconds"]
    ours = {size: speeds[f"batch {size}"] for size in SIZES}
    ratios = [a / b for a, b in zip(whole["prompts read once"], whole["plain"], strict=True)]
    return [
        Figure(
            "quick start: evaluation of all states over training",
            seconds["evaluation"] / seconds["training"],
            at_most=1.0,
            limit="Reading prompts, and as many steps as the longest answer of a batch has tokens.",
        ),
        Figure(
            f"answers in batches of {default}",
            ours[default],
            "tokens/s",
            limit="A step reads all weights, however many rows share it.",
        ),
        Figure(
            f"tokens/s in batches of {default} over `model.generate` at batch 1",
            ours[default] / speeds["model.generate, batch 1"],
            at_least=1.0,
            limit="Reading the prompts: no batch makes it cheaper.",
        ),
        Figure(
            f"tokens/s in batches of {default} over the best of {', '.join(map(str, SIZES))}",
            ours[default] / max(ours.values()),
            at_least=0.9,
            limit=f"Best here is {max(ours, key=lambda size: ours[size])}.",
        ),
        Figure(
            f"tokens/s over `model.generate`, both in batches of {default}",
            ours[default] / speeds[f"model.generate, batch {default}"],
            at_least=1.0,
            limit="Finished rows leave the batch; the rest is the forward pass.",
        ),
        Figure(
            "scoring and answering one client's rows, over a pass for the scores and `model.generate`",
            median(ratios),
            at_most=1.0,
            limit="Prompts are read once for both.",
        ),
    ]


def main() -> None:
    """Measure, print, write generation.json."""
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    given = command.parse_args()
    benchmark = Benchmark(
        "generation",
        "Generation for evaluation",
        f"One round of the quick start's FLEx part on smol-moe; then one client's model with its grafts answers "
        f"{MOST} test prompts of all silos, up to 32 tokens each.",
        [
            "The first figure takes evaluation's seconds and one round's from the run's summary, and counts the "
            "round as often as the recipe has rounds; after one round answers are longer than in the end.",
            "Batch sizes 1 and 4 are tried on every fourth and every second prompt; `model.generate` gets the same "
            "prompts, sorted by length, the same model and precision.",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = quick_start(given.settings, Path(folder))
        print({name: round(value, 1) for name, value in seconds.items()}, flush=True)
        found = measure(run, given.repeats)
        default = run.config.evaluation.batch_size
        run.close()
    details = {"quick_start_seconds": seconds, **found, "threads": torch.get_num_threads()}
    benchmark.write(given.out, figures(seconds, found, default), details)


if __name__ == "__main__":
    main()
