"""The error tree: one line that says value, rule, remedy; picklable; documented."""

from __future__ import annotations

import pickle
import re

import pytest

from flexperts import errors
from flexperts.errors import FlexpertsError

SUBCLASSES = sorted(FlexpertsError.__subclasses__(), key=lambda c: c.__name__)


def test_there_are_subclasses() -> None:
    assert {"ConfigError", "DataError", "PrivacyError"} <= {c.__name__ for c in SUBCLASSES}


@pytest.mark.parametrize("kind", [FlexpertsError, *SUBCLASSES])
def test_text_holds_value_rule_and_remedy_on_one_line(kind: type[FlexpertsError]) -> None:
    error = kind("lora.rank = 0", "must be at least 1", "raise it")
    assert str(error) == "lora.rank = 0: must be at least 1; raise it"
    assert (error.value, error.rule, error.remedy) == ("lora.rank = 0", "must be at least 1", "raise it")


@pytest.mark.parametrize("kind", [FlexpertsError, *SUBCLASSES])
def test_errors_survive_pickling(kind: type[FlexpertsError]) -> None:
    """Flower and process pools send exceptions between processes."""
    error = pickle.loads(pickle.dumps(kind("a", "b", "c")))
    assert type(error) is kind
    assert (error.value, error.rule, error.remedy, str(error)) == ("a", "b", "c", "a: b; c")


def test_errors_are_value_errors() -> None:
    assert issubclass(FlexpertsError, ValueError)


def test_the_documented_tree_is_the_real_one() -> None:
    branches = re.findall(r"^ *[├└]── (\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    assert sorted(branches) == [c.__name__ for c in SUBCLASSES]
    assert not any(c.__subclasses__() for c in SUBCLASSES)
