"""Every method says what it is in the same form: docs/methods.md is made from it."""

from __future__ import annotations

import re

import pytest

from flexperts.methods.registry import _METHODS, method_class, method_names

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
        assert "\n" not in line
        assert not line.endswith(".")
    assert len(method.summary) <= 100
    # A capital is part of a name (LoRA, FedAvg, a factor) or no capital at all.
    for line in (method.summary, method.sends, method.keeps):
        first = re.split(r"[\s',]", line)[0]
        assert first.islower() or len(re.findall("[A-Z]", first)) > 1 or first in "AB", line
