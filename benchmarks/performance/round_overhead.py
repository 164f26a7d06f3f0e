"""The cost of a run outside its passes through the model: the quick start's FLEx part, second by second.

    python benchmarks/performance/round_overhead.py
    python benchmarks/performance/round_overhead.py --set data.silos.train_rows=8 evaluation.rows=4    # a trial

The run is `flexperts run`, in this process, with the functions of `COMPUTE` and `OVERHEAD` wrapped from outside;
nothing in the package knows that it is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from figures import ROOT, Benchmark, Figure, parser
from phases import Clock

RECIPE = ROOT / "recipes" / "quickstart.toml"
IMPORTS = "imports"
COMPUTE = {
    "forward": [
        "flexperts.training.local:token_losses",
        "flexperts.evaluation.scores:read_prompts",
        "flexperts.evaluation.scores:response_losses",
    ],
    "selection": ["flexperts.methods.kit.turn:score_experts"],
    "backward": ["torch:Tensor.backward"],
    "optimizer": ["torch.nn.utils:clip_grad_norm_", "torch.optim:AdamW.step"],
    "generation": ["flexperts.evaluation.scores:answer"],
}
"""Useful work of a run. Clipping belongs to the optimizer; selection is forward passes and products of experts."""
OVERHEAD = {
    "base from cache": ["flexperts.client.workspace:load_base"],
    "rows": [
        "flexperts.client.workspace:load_clients",
        "flexperts.data.prompts:PromptEncoder.encode_all",
        "flexperts.training.local:pad_batch",
        "flexperts.evaluation.scores:prompt_batch",
        "flexperts.evaluation.scores:pad_responses",
    ],
    "adapters into the base": ["flexperts.client.model:ClientModel.__init__"],
    "trainer set-up and steps around the passes": ["flexperts.methods.kit.turn:train_local"],
    "state swap": ["flexperts.client.model:ClientModel.lend", "flexperts.methods.kit.turn:copy_tensors"],
    "personal files": [
        "flexperts.parameters.store:PersonalStore.load",
        "flexperts.parameters.store:PersonalStore.save",
    ],
    "predictions": ["flexperts.client.client:Client.write_predictions"],
    "checksums": ["flexperts.checked_file:_digest", "flexperts.client.client:vector_hash"],
    "waiting for the disk": ["os:fsync"],
    "messages": [
        "flexperts.client.client:encode",
        "flexperts.client.answer:records",
        "flexperts.client.answer:payload_of",
        "flexperts.server.strategy:records",
        "flexperts.server.strategy:encoded_bytes",
        "flexperts.server.admission:Admission.update",
    ],
    "search for personal bytes": ["flexperts.client.answer:personal_bytes"],
    "aggregation": ["flexperts.server.strategy:FlexpertsStrategy.aggregate_train"],
    "journal and checkpoint": [
        "flexperts.artifacts:RunDirectory.append_round",
        "flexperts.artifacts:RunDirectory.write_summary",
        "flexperts.server.strategy:save_server",
        "flexperts.server.serve:save_server",
        "flexperts.server.serve:write_adapter",
    ],
    "evaluation around the passes": [
        "flexperts.client.client:evaluate",
        "transformers.tokenization_utils_base:PreTrainedTokenizerBase.batch_decode",
    ],
    "ROUGE-L": ["flexperts.evaluation.scores:rouge_l"],
    "display": [
        f"flexperts.terminal.display:RunDisplay.{name}"
        for name in ("stage", "turn", "turn_ended", "round", "result")
    ],
    "Flower's apps": ["flexperts.engines.grid:InProcessGrid._deliver"],
}
"""Other named phases; a phase within another is not counted in the outer one."""
_FEW = 0.05
"""Percent below which a phase is not named on the page."""

Seconds = Mapping[str, float]


def run(clock: Clock, settings: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Run the recipe without its reference, as the command line does.

    Returns:
        The clock's seconds at the start and at the end of each round, in turn.
    """
    from flexperts.cli import main
    from flexperts.terminal import display

    marks: list[dict[str, float]] = []

    class MarkingDisplay(display.RunDisplay):
        def stage(self, text: str) -> None:
            super().stage(text)
            if text.startswith("round "):
                marks.append(clock.seconds())

        def round(self, record: Mapping[str, Any]) -> None:
            super().round(record)
            marks.append(clock.seconds())

    display.RunDisplay = MarkingDisplay  # type: ignore[misc]
    recipe = folder / RECIPE.name
    lines = RECIPE.read_text(encoding="utf-8").splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith("reference")), encoding="utf-8")
    options = [word for setting in settings for word in ("--set", setting)]
    main.app(["run", str(recipe), "--out", str(folder / "run"), *options], standalone_mode=False)
    return marks


def rounds_of(marks: Sequence[Seconds]) -> list[dict[str, float]]:
    """Return the seconds of each phase within each round."""
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return [{name: after[name] - before.get(name, 0.0) for name in after} for before, after in pairs]


def outside(seconds: Seconds) -> float:
    """Return the seconds outside the passes."""
    return sum(value for name, value in seconds.items() if name not in COMPUTE)


def share(seconds: Seconds) -> float:
    """Return the percent of the time outside the passes."""
    return 100 * outside(seconds) / sum(seconds.values())


def in_words(seconds: Seconds, *, compute: bool) -> str:
    """Return the phases on one side and their percent of all, largest first."""
    total = sum(seconds.values())
    percents = {n: 100 * s / total for n, s in seconds.items() if (n in COMPUTE) == compute}
    named = sorted((n for n in percents if percents[n] >= _FEW), key=lambda n: -percents[n])
    few = sum(percents.values()) - sum(percents[n] for n in named)
    return ", ".join([*(f"{n} {percents[n]:.1f} %" for n in named), *([f"all else {few:.2f} %"] if few else [])])


def figures(seconds: Seconds, training: Sequence[Seconds]) -> list[Figure]:
    """Return the figures.

    Args:
        seconds: The run's.
        training: Those of the rounds that train and do not evaluate.
    """
    started = {name: value for name, value in seconds.items() if name != IMPORTS}
    largest = sorted((n for n in started if n not in COMPUTE), key=lambda n: -started[n])[:3]
    return [
        Figure(
            "a whole run, its imports done: time outside forward, backward, optimizer, selection and generation",
            share(started),
            "%",
            at_most=5,
            limit=f"Most of it: {', '.join(largest)}. The base and ROUGE-L's library are loaded once a run.",
        ),
        Figure(
            "the same with the imports, which any process needs",
            share(seconds),
            "%",
            limit=f"{seconds[IMPORTS]:.1f} s for torch, transformers, PEFT and Flower, however long the run is.",
        ),
        Figure(
            "one round of training, four clients: the same share",
            median(share(one) for one in training),
            "%",
            at_most=5,
            limit=f"Outside the passes: {in_words(_median(training), compute=False)}.",
        ),
        Figure(
            "one round of training, four clients: time outside the passes",
            median(outside(one) for one in training),
            "s",
            limit="Most of it does not depend on how many steps a round has.",
        ),
    ]


def _median(several: Sequence[Seconds]) -> dict[str, float]:
    return {name: median(one[name] for one in several) for name in several[0]}


def main() -> None:
    """Run, and write round_overhead.json."""
    command = parser(__doc__)
    command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    given = command.parse_args()
    benchmark = Benchmark(
        "round_overhead",
        "Round overhead",
        f"`flexperts run {RECIPE.relative_to(ROOT)}` without its reference run, with terminal output and files: "
        "every second of its wall time belongs to one phase.",
    )
    clock = Clock()
    with clock.phase(IMPORTS):
        clock.watch(COMPUTE | OVERHEAD)
    with tempfile.TemporaryDirectory() as folder:
        rounds = rounds_of(run(clock, given.settings, Path(folder)))
        seconds = clock.seconds()
    if silent := [place for place, count in clock.calls.items() if not count]:
        raise SystemExit(f"never called, so a phase would be wrong: {', '.join(silent)}")
    benchmark.notes = [
        f"Of the run's {sum(seconds.values()):.0f} s: {in_words(seconds, compute=True)}.",
        f"Outside: {in_words(seconds, compute=False)}.",
        "The last round's evaluation is in the whole run, not in the figures of one round.",
    ]
    details = {
        "settings": given.settings,
        "functions": {"compute": COMPUTE, "overhead": OVERHEAD},
        "run": _rounded(seconds),
        "percent": {n: round(100 * s / sum(seconds.values()), 3) for n, s in seconds.items()},
        "calls": dict(clock.calls),
        "rounds": [_rounded(one) for one in rounds],
    }
    benchmark.write(given.out, figures(seconds, rounds[:-1]), details)


def _rounded(seconds: Seconds) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
