"""Every check and figure that a card is wanted for, in at most eight minutes on one card, without a hub.

    make gpu
    python benchmarks/performance/gpu.py --only attention runs
    python benchmarks/performance/gpu.py --device cpu --tiny --out /tmp/tried    # that the script itself works

Each section has seconds of its own. As it ends it writes its file under ``benchmarks/results/gpu``, also with what
was measured before a failure; the next section runs all the same. The last step writes docs/gpu.md from the files.
The exit code is not 0 if a target was missed or a section failed.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import gpu_page
import torch
from figures import Benchmark, Figure, line, parser
from gpu_card import Card
from gpu_kernels import attention, experts, quantized, sampling
from gpu_model import decoding, evaluation, selection, training, turn
from gpu_runs import families, runs

SECTIONS = {
    one.name: one
    for one in (
        attention,
        experts,
        selection,
        training,
        decoding,
        turn,
        evaluation,
        quantized,
        sampling,
        runs,
        families,
    )
}
"""Those on one base follow each other, because it is made once; in the order of the page."""
WHOLE = 480
"""Seconds of all sections together."""


class LateError(Exception):
    """A section's seconds are over. Not ``TimeoutError``, which callers take for a failed disk or network."""


def main() -> None:
    """Measure, and write the results and the page."""
    options = parser(__doc__)
    options.set_defaults(out=gpu_page.RESULTS)
    options.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    options.add_argument("--tiny", action="store_true", help="small shapes, to try the script on a CPU")
    options.add_argument("--only", choices=list(SECTIONS), nargs="*", default=list(SECTIONS))
    given = options.parse_args()
    card, started, bad = Card(torch.device(given.device), given.tiny), time.monotonic(), []
    for name in given.only:
        section = SECTIONS[name]
        left = WHOLE - (time.monotonic() - started)
        if left < section.seconds / 2:
            bad.append(f"{name}: no time left")
            continue
        benchmark = Benchmark(name, section.title, section.workload, section.notes)
        print(f"== {section.title}", flush=True)
        found: list[Figure] = []
        try:
            with at_most(section.seconds):
                for figure in section.measure(card):
                    print(line(figure), flush=True)
                    found.append(figure)
        except Exception as error:  # the next section may work
            traceback.print_exc()
            bad.append(f"{name}: {type(error).__name__}")
        benchmark.write(given.out, found, {"card": card.described}, tell=False)
        bad += [f"{name}: {figure.name}" for figure in found if figure.met is False]
        gc.collect()
    if given.out == gpu_page.RESULTS:
        gpu_page.PAGE.write_text(gpu_page.page(SECTIONS.values()), encoding="utf-8")
    if bad:
        sys.exit("\n".join(["failed or missed:", *bad]))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise ``LateError`` in the block after some seconds."""

    def late(*_: object) -> None:
        raise LateError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
