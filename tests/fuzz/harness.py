"""What the fuzz tests share: counted examples, clean refusals, and a folder around which nothing may change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexperts.errors import FlexpertsError

PLANNED: dict[str, int] = {}
"""Fuzz test -> examples that it tries."""

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "", ".", "..", "../x", "../../../x", "/", "/x", "x/../../y", "a\0b", "~", "~root/x", "C:\\x", "-rf",
            "x" * 300, "\u202e\u0661", "\u00b2", "\ufeff", "CON", "a\nb", "null", "NaN", "[red]x[/red]", "%s{0}",
            "hub:x", "hub:../x", "hub:http://x", "file:///etc/passwd", "𝒜" * 70, "é" * 120, "e\u0301",
        ]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 10**18, 1e308, 5e-324, -0.0, float("inf"), float("nan")]),
)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
"""JSON values, odd ones among them."""


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return bytes that are nearly the given ones: cut, changed, doubled, or with something put in between."""
    place = st.integers(0, len(whole))
    piece = st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\0", b"\xff\xfe", b'"', b"{", b"}", b"9" * 30, b"null"])
    )
    change = st.tuples(place, st.one_of(st.integers(0, 4), place), piece)

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        content = whole
        for start, removed, added in changes:
            content = content[:start] + added + content[start + removed :]
        return content

    return st.lists(change, min_size=1, max_size=4).map(apply)


@contextmanager
def clean_refusals() -> Iterator[None]:
    """Let errors of ours pass, if they say value, rule and remedy in text that can be printed."""
    try:
        yield
    except FlexpertsError as error:
        check(error)


def check(error: FlexpertsError) -> None:
    assert type(error) is not FlexpertsError
    for part in (error.value, error.rule, error.remedy):
        assert isinstance(part, str)
        assert part.strip()
    str(error).encode()


def snapshot(root: Path, but: Path) -> dict[str, bytes | None]:
    """Return every file and folder outside one folder."""
    outside = [p for p in root.rglob("*") if not p.is_relative_to(but)]
    return {str(p): p.read_bytes() if p.is_file() else None for p in outside}


def fuzz(examples: int, strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any, Path], None]], Any]:
    """Turn a test of a drawn value and a folder into one that tries many values, the same in every run."""

    def decorate(test: Callable[[Any, Path], None]) -> Any:
        PLANNED[test.__name__] = examples

        @functools.wraps(test, updated=())
        def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
            tried = 0
            root, folder = tmp_path / "root", tmp_path / "root" / "a" / "b" / "c"
            folder.mkdir(parents=True)
            (root / "a" / "x").write_text("not yours")
            monkeypatch.chdir(folder)
            before = snapshot(tmp_path, folder)

            @settings(
                max_examples=examples,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def one(value: Any) -> None:
                nonlocal tried
                tried += 1
                with clean_refusals():
                    test(value, folder)

            one()
            assert tried >= examples
            assert snapshot(tmp_path, folder) == before

        del whole.__wrapped__  # pytest would read the inner test's parameters
        return pytest.mark.fuzz(whole)

    return decorate
