"""The page of supported models, made by the tests that every family must pass.

    python benchmarks/supported_models.py                    # run the matrix, write docs/models.md (minutes)
    python benchmarks/supported_models.py --check            # run it, and fail if the page differs
    python benchmarks/supported_models.py --check --listed   # the same from the table of exceptions: nothing is run

Properties and exceptions are in tests/conformance/matrix.toml. The script stops without a page if a test fails that
is not an exception, or if an exception does not fail any more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import textwrap
import tomllib
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.moe.layout import LayerExperts
from flexperts.testing import FAMILIES, tiny_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "conformance"
PAGE = ROOT / "docs" / "models.md"
# Pytest sees that what it would rewrite is imported here already.
REWRITE = "ignore::pytest.PytestAssertRewriteWarning"
MATRIX = tomllib.loads((FOLDER / "matrix.toml").read_text(encoding="utf-8"))
MULTIMODAL = tomllib.loads((FOLDER / "multimodal.toml").read_text(encoding="utf-8"))
FILES = [
    FOLDER / f"test_{file}.py"
    for file in sorted({test.split("::")[0] for tests in MATRIX["properties"].values() for test in tests})
] + [FOLDER / "test_multimodal.py", FOLDER / "test_older_checkpoints.py"]

EXPLAINED = {
    "closed gate": "A graft with a closed gate does not change the base's logits by a single bit; nor does one "
    "that starts silent, or a graft that was removed.",
    "open gate": "An untrained graft at gate g is the model's own experts module run on that expert with weight g; "
    "its low-rank delta is the delta in the weights.",
    "read in place": "The frozen expert is a view into the base: nothing is copied.",
    "gradients": "They reach every gate and personal expert, and nothing of the base.",
    "checkpointing": "Gradient checkpointing changes no gradient.",
    "generation": "A grafted model generates the same text with a cache and without.",
    "files": "A personal state reads back bit for bit; saving a model with grafts attached saves the base.",
    "selection": "Scores of experts equal those of a reference that stores all values.",
    "routing": "The recorded routing is what the experts receive, without padding.",
    "router logits": "The full distribution over experts is recorded too.",
    "LoRA": "It finds exact Linear layers of attention only, all of them learn, and a step of LoRA and graft "
    "together lowers the loss.",
    "expert adapters": "Adapters in the pretrained experts (methods such as fedavg_experts) equal changed weights.",
    "bottlenecks": "Gated bottlenecks next to the layer (pfedmoe_style) compute their formula.",
    "router deltas": "A trained change of the router's matrix (moe_fedavg) equals a changed matrix.",
}


@dataclass
class Outcomes:
    """A pytest plugin: the outcomes of the matrix's tests, by (family, test).

    Args:
        reasons: (family, test) -> for each of its variants, why it is an exception, or None.
        failed: Names of tests with an unexpected outcome, or that were skipped.
    """

    reasons: dict[tuple[str, str], list[str | None]] = field(default_factory=lambda: defaultdict(list))
    failed: list[str] = field(default_factory=list)

    def add(self, properties: list[tuple[str, Any]], reason: str | None) -> None:
        """Note one variant of a test."""
        named = dict(properties)
        if "family" in named:
            self.reasons[named["family"], named["test"]].append(reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a test that was run."""
        reason = getattr(report, "wasxfail", None)
        if report.failed or (report.skipped and reason is None):
            self.failed.append(report.nodeid)
        elif report.when == "call":
            self.add(report.user_properties, reason)


class Listed(Outcomes):
    """The same from the tests that were collected, not run."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Record the expected outcome of each test."""
        for item in session.items:
            marks = [mark.kwargs["reason"] for mark in item.iter_markers("xfail")]
            self.add(item.user_properties, marks[0] if marks else None)


def outcomes(listed: bool) -> Outcomes:
    """Run the matrix, or only collect it.

    Raises:
        SystemExit: A test has an unexpected outcome, or the matrix cannot be run.
    """
    plugin = Listed() if listed else Outcomes()
    how = ["--collect-only", "-q"] if listed else ["-n", "2", "-q"]
    with contextlib.redirect_stdout(io.StringIO() if listed else sys.stdout):
        code = pytest.main([*map(str, FILES), "-m", "", "-p", "no:cacheprovider", "-W", REWRITE, *how], [plugin])
    if code or plugin.failed:
        sys.exit(f"tests of the matrix failed (pytest ended with {int(code)}): {plugin.failed[:5]}")
    return plugin


def page(found: Outcomes) -> str:
    """Return the page."""
    notes: dict[str, int] = {}
    rows = [_cells(family, found, notes) for family in sorted(FAMILIES)]
    named = [found.reasons[f, test] for f in FAMILIES for tests in MATRIX["properties"].values() for test in tests]
    variants = Counter(reason is not None for reasons in named for reason in reasons)
    held = {name: sum(row[i + 1] == "yes" for row in rows) for i, name in enumerate(MATRIX["properties"])}
    text = Path(__file__).with_suffix(".template.md").read_text(encoding="utf-8")
    return text.format(
        families=len(FAMILIES),
        checks=variants.total(),
        exceptions=variants[True],
        properties="\n".join(f"- **{n}** ({held[n]} of {len(rows)}). {EXPLAINED[n]}" for n in MATRIX["properties"]),
        matrix=_table(["model type", *MATRIX["properties"]], rows),
        notes="\n".join(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()),
        facts=_table(FACTS, [_facts(family) for family in sorted(FAMILIES)]),
        multimodal=textwrap.fill(", ".join(f"`{kind}`" for kind in sorted(MULTIMODAL)), 116),
        count=len(MULTIMODAL),
    )


def _cells(family: str, found: Outcomes, notes: dict[str, int]) -> list[str]:
    """Return a family's row: yes, part or no for every property, with the numbers of the notes."""
    cells = [f"`{family}`"]
    for tests in MATRIX["properties"].values():
        if missing := [test for test in tests if not found.reasons[family, test]]:
            sys.exit(f"{family} has no outcome of {missing}")
        reasons = [reason for test in tests for reason in found.reasons[family, test]]
        why = list(dict.fromkeys(reason for reason in reasons if reason))
        numbers = ", ".join(str(notes.setdefault(reason, len(notes) + 1)) for reason in why)
        word = "yes" if not why else "part" if None in reasons else "no"
        cells.append(f"{word} ({numbers})" if why else word)
    return cells


FACTS = ["model type", "class", "experts", "their parameters", "LoRA on"]


def _facts(family: str) -> list[str]:
    model = tiny_model(family)
    experts = find_experts(model)[0]
    inside = {id(p) for p in experts.stored}
    names = [name.removesuffix(".weight") for name, p in experts.module.named_parameters() if id(p) in inside]
    stored = [name.rpartition(".")[2] for name in names]
    linears = sorted({name.rpartition(".")[2] for name in attention_linears(model)})
    return [f"`{family}`", type(model).__name__, _layout(experts), ", ".join(stored), ", ".join(linears)]


def _layout(experts: LayerExperts) -> str:
    """Return how a layer's experts are stored, in words."""
    kind = type(experts).__name__.removesuffix("WithIdentities").removesuffix("Experts").lower()
    weights = experts.expert(0)
    flags = {
        "transposed": experts.is_transposed,
        "no gate": not experts.has_gate,
        "biases": weights.up_bias is not None,
        "a norm after each": getattr(experts.module, "has_post_expert_norm", False),
        "identities": experts.num_identities > 0,
    }
    return ", ".join([kind, *(name for name, holds in flags.items() if holds)])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page; write nothing")
    parser.add_argument("--listed", action="store_true", help="take the outcomes from the table of exceptions")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = page(outcomes(arguments.listed))
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/models.md is out of date; run: python benchmarks/supported_models.py")


if __name__ == "__main__":
    main()
