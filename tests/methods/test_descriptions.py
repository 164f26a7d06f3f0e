"""Every method says what it is in the same form: docs/methods.md is made from it."""

from __future__ import annotations

import re

import pytest

from flexperts.config.run import MethodConfig
from flexperts.methods.registry import _METHODS, make_method, method_class, method_names

PARTS = ("Source:", "Trained:", "Sent:", "Aggregated:", "Stays:", "Inference:", "Open choices:")


def test_the_registry_is_sorted() -> None:
    assert list(_METHODS) == sorted(_METHODS)


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_described_in_the_one_form(name: str) -> None:
    method = method_class(name)
    text = method.__doc__ or ""
    places = [text.find(part) for part in PARTS]
    assert -1 not in places
    assert places == sorted(places)
    for line in (method.summary, method.source, method.sends, method.keeps):
        assert line
    for line in (method.summary, method.source, method.sends, method.keeps, method.budget_note):
        assert "\n" not in line
        assert not line.endswith(".")
        assert "  " not in line
    assert len(method.summary) <= 100
    # A capital is part of a name (LoRA, FedAvg, a factor) or no capital at all.
    for line in (method.summary, method.sends, method.keeps):
        first = re.split(r"[\s',]", line)[0]
        assert first.islower() or len(re.findall("[A-Z]", first)) > 1 or first in "AB", line


BUDGETS = {
    "comigs": "router_steps (10)",
    "ditto": "twice FedAvg's steps",
    "fdlora": "20",
    "fedadagrad": "averages uniformly",
    "fedadam": "squares m instead of the change",
    "fedavgm": "0.5 instead of 0.9",
    "feddpa_f": "twice FedAvg's steps",
    "feddpa_t": "twice FedAvg's steps from round 2",
    "fedlease": "all clients train in the warm-up",
    "fedyogi": "squares m instead of the change",
    "pfedmoe_style": "an adaptation",
}
"""Methods whose steps, searched rows or equations a reader of their scores must know."""


def test_budgets_and_variants_are_told_of_the_methods_that_have_them() -> None:
    assert {name for name in method_names() if method_class(name).budget_note} == BUDGETS.keys()
    for name, words in BUDGETS.items():
        assert words in make_method(MethodConfig(name=name)).budget()
    fdlora = make_method(MethodConfig(name="fdlora", options={"fusion_budget": 33}))
    assert "(33) on fusion_rows of its train rows (8)" in fdlora.budget()
    assert make_method(MethodConfig(name="flex")).budget() == ""
    assert "4 more rounds" in make_method(MethodConfig(name="flex", options={"finish": 4})).budget()
