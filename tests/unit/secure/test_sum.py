"""The sum of secure aggregation is the plain sum, also when clients drop out; the server's view gives no update."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import flexperts.communication.secure as secure
from flexperts.communication.secure import ciphers, graph, silo, tally
from flexperts.communication.secure.discrete_gaussian import discrete_gaussian
from flexperts.communication.secure.fixed_point import FixedPoint, Ring
from flexperts.communication.secure.masks import common_mask, own_mask
from flexperts.communication.secure.messages import Advertised, Message
from flexperts.errors import FederationError

from .rounds import CLIP, Round

FOLDER = Path(secure.__file__).parent


@settings(max_examples=60)
@given(st.data())
def test_the_sum_is_the_plain_sum_or_the_round_is_refused(data: st.DataObject) -> None:
    """Rosters, drop-outs at each phase, orders of messages; equality is bit for bit."""
    count = data.draw(st.integers(3, 7))
    one = Round(count, share=data.draw(st.sampled_from([0.5, 0.6, 0.75])), number=data.draw(st.integers(1, 99)))
    gone = [data.draw(st.sets(st.sampled_from(one.names), max_size=2)) for _ in range(3)]
    orders = [data.draw(st.permutations(one.names)) for _ in range(3)]
    ready, kept = set(one.names) - gone[0], set(one.names) - gone[0] - gone[1]
    left = kept - gone[2]
    enough = [len(names) >= one.tally.least for names in (ready, kept, left)]
    if not all(enough):
        with pytest.raises(FederationError, match="silos are left in the round"):
            one.advertise(gone[0], orders[0]).mask(gone[1], orders[1]).reveal(gone[2], orders[2]).tally.total()
        return
    total, faults = (
        one.advertise(gone[0], orders[0]).mask(gone[1], orders[1]).reveal(gone[2], orders[2]).tally.total()
    )
    assert one.tally.survivors == sorted(kept)
    assert faults == {}
    assert total.tobytes() == one.plain().tobytes()
    mean = one.tally.numbers.decode(total) / one.tally.weight
    rows = {name: one.rows[name] for name in kept}
    exact = sum(one.changes[n].astype(np.float64) * k for n, k in rows.items()) / sum(rows.values())
    assert np.abs(mean - exact).max() <= len(kept) * one.tally.numbers.step / 2 / one.tally.weight


@pytest.mark.parametrize("agrees", [False, True])
def test_the_planned_bytes_are_those_of_a_silos_messages(agrees: bool) -> None:
    one, keys = Round(19, agrees=agrees), dict[str, Advertised]()
    for name in one.names:
        keys[name] = one.silos[name].advertise(one.tally.setup(name))
        one.tally.advertise(name, keys[name])
    one.mask()
    agreed = {name: one.silos[name].agree(one.tally.closed(name)) for name in one.names if agrees}
    asked = one.tally.unmask("s03", {name: its.signature for name, its in agreed.items()})
    closing = [one.tally.closed("s03")] if agrees else []
    signed = [agreed["s03"]] if agrees else []
    sent: list[Message] = [keys["s03"], *signed, one.silos["s03"].reveal(asked)]
    received: list[Message] = [one.tally.setup("s03"), one.tally.masking("s03"), *closing, asked]
    sizes = [sum(len(message.model_dump_json()) for message in messages) for messages in (sent, received)]
    planned = tally.message_bytes(one.names, one.share, agreement=agrees)["s03"]
    assert list(planned) == pytest.approx(sizes, rel=0.01)


@settings(max_examples=60)
@given(
    st.integers(3, 5000),
    st.floats(1e-3, 1e4),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_whole_numbers_cannot_overflow(clients: int, clip: float, values: list[float], weight: float) -> None:
    numbers = FixedPoint(clip, clients)
    change = (np.array(values) * clip).astype(np.float32)
    extreme = np.full(1, clip, np.float32)
    for vector, factor in ((change, weight), (extreme, 1.0), (-extreme, 1.0)):
        whole = numbers.encode(vector, factor).view(f"<i{numbers.bits // 8}").astype(object)
        assert max(abs(int(v)) for v in whole) * clients < 2 ** (numbers.bits - 1)
        once = numbers.decode(numbers.encode(vector, factor))
        assert (
            np.abs(once - vector.astype(np.float64) * factor).max() <= numbers.step * (0.5 + 1e-3 * 2) + clip * 2e-7
        )
    assert numbers.bits == (32 if clients < 2048 else 64)
    assert numbers.step <= clip / 2**20


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.1, -2.1])
def test_what_could_overflow_is_refused(value: float) -> None:
    with pytest.raises(FederationError, match="the sum could overflow"):
        FixedPoint(2.0, 4).encode(np.array([0.0, value], np.float32))
    with pytest.raises(FederationError, match="weights at most 1"):
        FixedPoint(2.0, 4).encode(np.zeros(1, np.float32), 1.01)


def test_many_silos_share_with_their_neighbours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graph, silo):
        monkeypatch.setattr(module, "degree", lambda clients, share: 6)
    one = Round(14)
    assert {len(names) for names in one.tally.holders.values()} == {7}
    assert all(name in one.tally.holders[peer] for name, peers in one.tally.holders.items() for peer in peers)
    one.advertise(["s03"]).mask(["s07"]).reveal(["s01"])
    total, _ = one.tally.total()
    assert total.tobytes() == one.plain().tobytes()


def test_neighbours_are_as_many_as_the_source_asks_for() -> None:
    assert [graph.degree(n, 0.5) for n in (3, 20, 100)] == [2, 19, 99]
    few, many = graph.degree(200, 0.6), graph.degree(5000, 0.6)
    assert few < many < 300
    for clients, k in ((200, few), (5000, many)):
        threshold = graph.threshold_of(k + 1, 0.6)
        bad, left = clients // 3, clients - clients // 5
        assert clients * stats.hypergeom(clients, bad, k).sf(threshold - 1) < 2**-40
        assert clients * stats.hypergeom(clients, left, k).cdf(threshold - 2) < 2**-20


def test_a_masked_update_looks_random() -> None:
    """Alone, and beside the same silo's update masked in another session."""
    size = 1 << 16
    one, two = (Round(4, size=size, number=1).advertise().mask() for _ in range(2))
    for name in one.names:
        assert_random(one.sent[name], one.changes[name])
        assert_random(one.sent[name] - two.sent[name], one.changes[name])


def assert_random(masked: Ring, change: np.ndarray) -> None:
    counts = np.bincount(masked.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6
    signed = masked.view(np.int32).astype(np.float64)
    assert abs(np.corrcoef(signed, change)[0, 1]) < 6 / masked.size**0.5
    assert stats.kstest(signed / 2**32 + 0.5, "uniform").pvalue > 1e-6


@pytest.mark.parametrize(("count", "gone"), [(4, []), (6, ["s05"]), (7, ["s06"])])
def test_server_and_half_of_the_silos_together_get_no_single_update(count: int, gone: list[str]) -> None:
    """They take off every mask that they can compute: what is left of one update is random; only the sum is not.

    Honest are the first silos, and one that has dropped out at last.
    """
    size = 1 << 14
    one = Round(count, size=size).advertise().mask(gone).reveal()
    total, _ = one.tally.total()
    colluding = one.names[count - count // 2 :] if not gone else one.names[-1 - count // 2 : -1]
    honest = [name for name in one.tally.survivors if name not in colluding]
    assert len(colluding) == count // 2
    assert len(honest) >= 2
    left = {name: stripped(one, name, colluding) for name in honest}
    for name in honest:
        assert_random(left[name], one.changes[name])
        assert small_seed(left[name], one.tally.numbers) is None
    rest = total.copy()
    for name in set(one.tally.survivors) - set(honest):
        rest -= one.tally.numbers.encode(one.changes[name], one.rows[name] / max(one.rows.values()))
    np.testing.assert_array_equal(sum(left.values()), rest)  # so all masks but those among the honest are off
    for victim in gone:  # its private key came out, so its masks are known, and its late update still has its own
        assert_random(late(one, victim), one.changes[victim])


def stripped(one: Round, name: str, colluding: list[str]) -> Ring:
    """Return an honest silo's masked update without the masks that server and colluding silos can compute."""
    terms, numbers = one.tally.terms, one.tally.numbers
    shares = {
        one.tally.holders[name].index(peer) + 1: bytes.fromhex(sent.secrets[name])
        for peer, sent in list(one.tally._revealed.items())[: terms.threshold]
    }
    rest = one.sent[name] - own_mask(ciphers.secret_of(shares), terms, numbers, one.size)
    gone = [peer for peer in one.names if peer not in one.tally.survivors]
    for peer in [*colluding, *gone]:
        key = one.silos[peer].state.sessions[terms.session].key  # a dropped one's is rebuilt from shares
        mask = one.tally._advertised[name].mask
        common = common_mask(bytes.fromhex(key), mask, terms, numbers, (name, peer), one.size)
        rest = rest - common if name < peer else rest + common
    return rest


def late(one: Round, victim: str) -> Ring:
    """Return the late masked update of a silo whose private key has been rebuilt, without its masks with others."""
    terms, numbers = one.tally.terms, one.tally.numbers
    rest = one.masked(victim, one.tally.masking(victim))
    key = bytes.fromhex(one.silos[victim].state.sessions[terms.session].key)
    for peer in one.names:
        if peer != victim:
            mask = one.tally._advertised[peer].mask
            common = common_mask(key, mask, terms, numbers, (victim, peer), one.size)
            rest = rest - common if victim < peer else rest + common
    return rest


def small_seed(masked: Ring, numbers: FixedPoint) -> int | None:
    """Return the seed of a mask that comes from a small number, by trying them all; None if there is none.

    This recovery has broken masks whose seeds had 28 varying bits: a seed is right if what is left is small.
    """
    for seed in range(1 << 12):
        stream = ciphers.keystream(seed.to_bytes(32, "little"), 16, numbers.dtype)
        left = (masked[:16] - stream).view(np.int32).astype(np.int64)
        if np.abs(left).max() <= numbers.most // 16:
            return seed
    return None


def test_the_recovery_finds_a_small_seed() -> None:
    numbers = FixedPoint(CLIP, 4)
    update = numbers.encode(np.full(100, 0.01, np.float32))
    seed = random.Random(1).randrange(1 << 12)
    assert small_seed(update + ciphers.keystream(seed.to_bytes(32, "little"), 100, numbers.dtype), numbers) == seed


def test_fewer_shares_than_the_threshold_fit_any_secret() -> None:
    shares = dict(enumerate(ciphers.shares_of(b"s" * 32, 3, 5), 1))
    two = {1: shares[1], 2: shares[2]}
    found = {ciphers.secret_of(two | {3: bytes([value]) * 32}) for value in range(50)}
    assert len(found) == 50
    assert b"s" * 32 not in found
    assert ciphers.secret_of(two | {4: shares[4]}) == b"s" * 32


def test_neither_side_imports_the_other_nor_torch_nor_flower() -> None:
    for path in FOLDER.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        names = {n.module or "" for n in tree if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.startswith(("torch", "flwr", "flexperts.communication.messages"))]
        other = {"silo.py": "tally", "tally.py": "silo"}.get(path.name)
        assert f"flexperts.communication.secure.{other}" not in names
    assert tally.Tally.__module__.endswith("tally")


@pytest.mark.parametrize("std", [0.7, 3.0, 40.5])
def test_noise_is_a_discrete_gaussian(std: float) -> None:
    drawn = discrete_gaussian(200_000, std)
    reach = int(4 * std) + 1
    values = np.arange(-reach, reach + 1)
    mass = np.exp(-(values**2) / (2 * std**2))
    counts = np.array([(drawn == value).sum() for value in values])
    inside = counts.sum()
    expected = mass / mass.sum() * inside
    enough = expected > 20
    found = stats.chisquare(counts[enough], expected[enough] * counts[enough].sum() / expected[enough].sum())
    assert found.pvalue > 1e-6
    assert inside > 0.999 * drawn.size


def test_the_sum_has_at_least_the_noise_that_the_recipe_asks_for() -> None:
    """With three of four silos it has just that, and no value with noise can overflow."""
    one = Round(4, size=100_000, noise=2.0).advertise().mask(["s03"]).reveal()
    total, _ = one.tally.total()
    numbers = one.tally.numbers
    exact = sum(
        one.changes[n].astype(np.float64) * one.rows[n] / max(one.rows.values()) for n in one.tally.survivors
    )
    noise = numbers.decode(total) - exact
    assert abs(noise.std() / (2.0 * CLIP) - 1) < 0.01
    assert abs(noise.mean()) < 6 * 2.0 * CLIP / 100_000**0.5
    assert numbers.noise == pytest.approx(2.0 * CLIP / 3**0.5)
    quiet = FixedPoint(CLIP, 4, numbers.noise)
    whole = quiet.encode(np.full(1, CLIP, np.float32)).view(np.int32)
    assert abs(int(whole[0])) <= quiet.most
    with pytest.raises(FederationError, match=r"noise of .* steps on 2 values: it needs 100 steps"):
        FixedPoint(CLIP, 4, 1e-8).encode(np.zeros(2, np.float32))
