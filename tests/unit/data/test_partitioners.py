"""Who gets which row: every row to exactly one client, whatever the table."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexperts.config.data import PartitionConfig
from flexperts.data.partition import Shares, assign
from flexperts.errors import DataError

DOLLY = ["brainstorming", "classification", "information_extraction", "summarization"]
LABELS = [DOLLY[i % 4] for i in range(200)] + ["classification"] * 61


def divide(labels: list[str], seed: int = 0, **given: Any) -> Shares:
    return assign(labels, PartitionConfig.model_validate({"source": "pool", **given}), seed)


def check_cover(shares: Shares, rows: int) -> None:
    assert sorted(i for share in shares.values() for i in share) == list(range(rows))
    assert all(type(i) is int for share in shares.values() for i in share)


def kinds_of(shares: Shares, labels: list[str]) -> dict[str, set[str]]:
    return {name: {labels[i] for i in share} for name, share in shares.items()}


WAYS: list[dict[str, Any]] = [
    {"by": "pathological", "clients": 4},
    {"by": "pathological", "clients": 3, "categories_per_client": 2},
    {"by": "dirichlet", "clients": 5},
    {"by": "natural"},
    {"by": "iid", "clients": 7},
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))


@ways
def test_every_row_goes_to_exactly_one_client(way: dict[str, Any]) -> None:
    shares = divide(LABELS, **way)
    check_cover(shares, len(LABELS))
    assert min(map(len, shares.values())) >= 8
    assert len(shares) == way.get("clients", 4)


@ways
def test_the_seed_decides(way: dict[str, Any]) -> None:
    assert divide(LABELS, 3, **way) == divide(LABELS, 3, **way)
    one, other = divide(LABELS, 3, **way), divide(LABELS, 4, **way)
    assert one != other  # the order, at least
    fixed = way["by"] == "natural" or way == WAYS[0]
    assert ({n: set(s) for n, s in one.items()} == {n: set(s) for n, s in other.items()}) is fixed


@ways
def test_a_negative_seed_will_do(way: dict[str, Any]) -> None:
    check_cover(divide(LABELS, -1, **way), len(LABELS))


@ways
def test_a_clients_rows_are_shuffled(way: dict[str, Any]) -> None:
    assert all(share != sorted(share) for share in divide(LABELS, **way).values())


# Pathological


def test_one_category_per_client_names_the_client() -> None:
    shares = divide(LABELS, by="pathological", clients=4)
    assert kinds_of(shares, LABELS) == {kind: {kind} for kind in DOLLY}
    assert {n: len(s) for n, s in shares.items()} == Counter(LABELS)


@pytest.mark.parametrize(("clients", "each"), [(2, 2), (1, 4)])
def test_clients_with_categories_of_their_own(clients: int, each: int) -> None:
    """The library's own modes would share some of them and leave others out."""
    kinds = kinds_of(divide(LABELS, by="pathological", clients=clients, categories_per_client=each), LABELS)
    assert list(kinds.values()) == [set(DOLLY[i * each : (i + 1) * each]) for i in range(clients)]
    assert list(kinds) == [f"client-0{i + 1}" for i in range(clients)]


@pytest.mark.parametrize(("clients", "each"), [(4, 2), (3, 2), (5, 1), (2, 3), (4, 4)])
def test_clients_that_share_categories_have_the_number_asked_for(clients: int, each: int) -> None:
    shares = divide(LABELS, by="pathological", clients=clients, categories_per_client=each)
    check_cover(shares, len(LABELS))
    kinds = list(kinds_of(shares, LABELS).values())
    assert kinds == [{DOLLY[(c + i) % 4] for i in range(each)} for c in range(clients)]


def test_a_shared_category_is_cut_at_random_and_evenly() -> None:
    labels = ["a"] * 41
    shares = divide(labels, by="pathological", clients=2)
    assert sorted(map(len, shares.values())) == [20, 21]
    assert all(min(share) < 15 and max(share) > 25 for share in shares.values())  # runs of neighbours would fail
    assert list(shares) == ["client-01", "client-02"]


@pytest.mark.parametrize(("clients", "each"), [(3, 1), (2, 1), (1, 3), (2, 5)])
def test_categories_left_out_are_refused(clients: int, each: int) -> None:
    with pytest.raises(
        DataError, match=rf"{clients} clients with {each} of 4 categories each: all categories must"
    ):
        divide(LABELS, by="pathological", clients=clients, categories_per_client=each)


def test_a_category_too_small_to_share_is_refused() -> None:
    labels = ["a"] * 40 + ["b"]
    with pytest.raises(DataError, match="no division found that gives 4 clients 1 rows each"):
        divide(labels, by="pathological", clients=4, categories_per_client=2, min_rows=1)


def test_categories_that_make_no_names() -> None:
    labels = ["a b", "a/b", ".c"] * 10
    assert list(divide(labels, by="pathological", clients=3)) == ["client-01", "client-02", "client-03"]
    assert list(divide(["a b", ".c"] * 10, by="pathological", clients=2)) == ["-c", "a-b"]


# Dirichlet


def distance(alpha: float, seed: int) -> float:
    """Mean total variation between a client's categories and the whole set's: 0 = alike, 1 = nothing in common."""
    shares = divide(LABELS, seed, by="dirichlet", clients=4, alpha=alpha)
    whole = Counter(LABELS)
    counts = [Counter(LABELS[i] for i in share) for share in shares.values()]
    return sum(sum(abs(c[k] / c.total() - whole[k] / whole.total()) for k in DOLLY) / 2 for c in counts) / len(
        counts
    )


def test_a_small_alpha_is_more_skewed() -> None:
    means = [math.fsum(distance(alpha, seed) for seed in range(8)) / 8 for alpha in (0.1, 1.0, 100.0)]
    assert means[0] > means[1] + 0.1 > means[2] + 0.2
    assert means[2] < 0.1


def test_the_seed_decides_the_draw_too() -> None:
    sizes = [[len(s) for s in divide(LABELS, seed, by="dirichlet", clients=5).values()] for seed in range(3)]
    assert len(set(map(tuple, sizes))) == 3


def test_dirichlet_sizes_are_unequal() -> None:
    sizes = [len(s) for s in divide(LABELS, by="dirichlet", clients=5).values()]
    assert max(sizes) - min(sizes) > 10


@pytest.mark.parametrize("seed", range(6))
def test_a_tiny_alpha_covers_or_is_refused(seed: int) -> None:
    """Self-balancing then divides zero by zero; nothing may be lost, and nothing may be said."""
    with contextlib.suppress(DataError):
        check_cover(divide(LABELS, seed, by="dirichlet", clients=4, alpha=1e-3, min_rows=1), len(LABELS))


# Natural and iid


def test_natural_ids_are_the_clients() -> None:
    labels = ["ward 7"] * 9 + ["A&E"] * 12 + [".hidden"] * 8 + ["x_y-z.1"] * 30
    shares = divide(labels, by="natural")
    assert {name: len(share) for name, share in shares.items()} == {
        "-hidden": 8,
        "A-E": 12,
        "ward-7": 9,
        "x_y-z.1": 30,
    }
    assert set(shares["ward-7"]) == set(range(9))


def test_ids_that_end_in_nul_stay_apart() -> None:
    """numpy's text arrays would make them one."""
    assert len(divide(["a"] * 8 + ["a\0"] * 8, by="natural")) == 2


def test_ids_with_one_name_are_refused() -> None:
    with pytest.raises(DataError, match=r"category 'a b' and 'a/b': both would be the client 'a-b'"):
        divide(["a b"] * 8 + ["a/b"] * 8, by="natural")


def test_iid_sizes_differ_by_one_at_most() -> None:
    shares = divide(LABELS, by="iid", clients=7)
    sizes = [len(s) for s in shares.values()]
    assert max(sizes) - min(sizes) == 1
    assert all(kinds == set(DOLLY) for kinds in kinds_of(shares, LABELS).values())


def test_numbers_in_names_have_one_width() -> None:
    names = list(divide(["a"] * 100, by="iid", clients=100, min_rows=1))
    assert (names[0], names[-1]) == ("client-001", "client-100")


# Sizes


@pytest.mark.parametrize("by", ["pathological", "dirichlet", "iid"])
def test_more_clients_than_the_rows_allow(by: str) -> None:
    with pytest.raises(
        DataError, match=r"pool: 31 rows for 4 clients: each needs data.partition.min_rows = 8, so 32"
    ):
        divide(["a"] * 31, by=by, clients=4)


@pytest.mark.parametrize("way", [{"by": "natural"}, {"by": "pathological", "clients": 2}])
def test_a_client_below_min_rows_is_refused(way: dict[str, Any]) -> None:
    labels = ["a"] * 30 + ["b"] * 7
    with pytest.raises(DataError, match=r"a client with 7 rows, .* each needs data.partition.min_rows = 8"):
        divide(labels, **way)
    assert len(divide(labels, **way, min_rows=7)) == 2


def test_a_dirichlet_draw_below_min_rows_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"no division found that gives 4 clients 65 rows each; .* raise data.partition.alpha"
    ):
        divide(LABELS, by="dirichlet", clients=4, alpha=0.1, min_rows=65)


TABLES = st.lists(st.text(max_size=2), min_size=1, max_size=60)


@given(
    TABLES,
    st.sampled_from(["pathological", "dirichlet", "natural", "iid"]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(1e-3, 1e3),
    st.integers(1, 4),
    st.integers(),
)
def test_any_table_is_covered_or_refused(
    labels: list[str], by: str, clients: int, each: int, alpha: float, min_rows: int, seed: int
) -> None:
    way: dict[str, Any] = {"by": by, "min_rows": min_rows}
    way |= {} if by == "natural" else {"clients": clients}
    way |= {"pathological": {"categories_per_client": each}, "dirichlet": {"alpha": alpha}}.get(by, {})
    try:
        shares = divide(labels, seed, **way)
    except DataError:
        return
    check_cover(shares, len(labels))
    assert len(shares) == (len(set(labels)) if by == "natural" else clients)
    assert min(map(len, shares.values())) >= min_rows


# The library stays quiet


@ways
def test_nothing_is_written_or_said(
    way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    divide(LABELS, **way)
    assert list(tmp_path.iterdir()) == []
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_library_sees_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[dict[str, Any]] = []
    real = datasets.Dataset.from_dict
    monkeypatch.setattr(datasets.Dataset, "from_dict", lambda table: seen.append(table) or real(table))
    divide(LABELS, by="natural")
    assert [set(table) for table in seen] == [{"row", "label"}]
    assert all(type(value) is int for column in seen[0].values() for value in column)
