"""CoMiGS: a whole run against a plain loop, the formula of a layer, the router's rows and its cadence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexperts.artifacts import RunDirectory
from flexperts.data.batches import training_batches
from flexperts.engines.run import run_federation
from flexperts.methods.comigs import CoMiGS, Shares
from flexperts.seeding import generator
from flexperts.server.checkpoint import load_server

from .by_hand import PLAIN, RATE, ROUNDS, SCALE, STEPS, Plain, compare, cosine, leaf, lora_layers, sgd
from .conftest import SETTINGS

OPTIONS = "method.options={router_every=3, router_steps=2, validation=0.25, balance=0.5, target=0.3}"
EVERY, ITERATIONS, BALANCE, TARGET = 3, 2, 0.5, 0.3
PAIR = "gated.layers.model/layers/{}/mlp/experts."
OWN = ("personal.down", "personal.up", "gate.W")


class PlainPairs(Plain):
    """The plain base with a pair beside each MoE layer; ``tensors`` are those in use."""

    tensors: Mapping[str, Tensor]

    @contextmanager
    def pairs(self) -> Iterator[list[Tensor]]:
        """Add the pairs' outputs inside the block; yield the routers' weights of the forward passes."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for i, layer in enumerate(self.base.model.layers):

                def add(_module: Any, args: Any, output: Tensor, i: int = i) -> Tensor:
                    p = {n.removeprefix(PAIR.format(i)): t for n, t in self.tensors.items()}
                    x = args[0]
                    scores = torch.exp(x @ p["gate.W"].T)
                    weights = scores / scores.sum(-1, keepdim=True)
                    seen.append(weights)
                    G, F = (2.0 * (x @ p[f"{k}.down"].T) @ p[f"{k}.up"].T for k in ("shared", "personal"))
                    return output + weights[:, :1] * G + weights[:, 1:] * F

                stack.callback(layer.mlp.experts.register_forward_hook(add).remove)
            yield seen

    def step(self, names: Sequence[str], rows: Sequence[Any], rate: float) -> None:
        """Take one SGD step on some of the tensors; rows pass one by one, and each has a balance loss."""
        with self.pairs() as seen:
            deltas = {m: SCALE * B @ A for m, (A, B) in lora_layers(self.tensors).items()}
            loss = self.loss(rows, lambda: deltas)
        for weights in seen:
            P = weights.mean(0)
            first = (weights[:, 0] >= weights[:, 1]).float().mean()
            balance = first * P[0] / TARGET + (1 - first) * P[1] / (1 - TARGET)
            loss = loss + BALANCE * balance / len(seen)
        sgd([self.tensors[n] for n in names], loss, rate)


def test_a_run_is_a_loop_of_two_levels(recipe: Any, byte_base: Path, tmp_path: Path) -> None:
    """Updates of the router fall into round 2, between its two steps, and at the end of round 3."""
    config = recipe(f"model.base={byte_base}", "method.name=comigs", OPTIONS, *PLAIN, "training.personal_lr=20.0")
    plain = PlainPairs(config)
    own = {c: {n: t for n, t in plain.start.items() if n.endswith(OWN)} for c in plain.clients}
    common = {n: t for n, t in plain.start.items() if not n.endswith(OWN)}
    for number in range(1, ROUNDS + 1):
        sent = []
        for client in plain.clients:
            rows = plain.rows[client]
            order = torch.randperm(len(rows), generator=generator(config.seed, client, "validation")).tolist()
            validation, train = [rows[i] for i in sorted(order[:2])], [rows[i] for i in sorted(order[2:])]
            plain.tensors = {n: leaf(t) for n, t in {**common, **own[client]}.items()}
            stream = plain.stream(client, number)
            shared = [n for n in plain.tensors if n in common]
            personal = [n for n in plain.tensors if ".personal." in n]
            routers = [n for n in plain.tensors if n.endswith("gate.W")]
            done = (number - 1) * STEPS
            while done < number * STEPS:
                count = min(EVERY - done % EVERY, number * STEPS - done)
                for batch in training_batches(train, 3, count, stream):
                    before = dict(plain.tensors)
                    # Both groups move by the gradients at one point: the second rate is twice the first.
                    plain.tensors = {n: leaf(t) for n, t in before.items()}
                    rate = cosine(RATE, done, ROUNDS * STEPS)
                    plain.step(shared, batch, rate)
                    moved = {n: plain.tensors[n] for n in shared}
                    plain.tensors = {n: leaf(t) for n, t in before.items()}
                    plain.step(personal, batch, 2 * rate)
                    plain.tensors = {**plain.tensors, **moved}
                    done += 1
                if done % EVERY == 0:
                    first = (done // EVERY - 1) * ITERATIONS
                    for i, batch in enumerate(training_batches(validation, 3, ITERATIONS, stream)):
                        rate = 2 * cosine(RATE, first + i, ROUNDS * STEPS // EVERY * ITERATIONS)
                        plain.step(routers, batch, rate)
            own[client] = {n: plain.tensors[n].detach() for n in own[client]}
            sent.append({n: plain.tensors[n].detach() for n in common})
        common = {n: torch.stack([s[n] for s in sent]).mean(0) for n in common}

    run_federation(config, tmp_path / "run")
    found = load_server(RunDirectory.open(tmp_path / "run").checkpoint).shared.tensors()
    assert found.keys() == common.keys()
    for kind in ("lora_A", "lora_B", "shared.down", "shared.up"):
        compare((found[n], common[n], plain.start[n]) for n in found if kind in n)
    for client in plain.clients:
        kept = load_file(tmp_path / "run" / "personal" / f"{client}.safetensors")
        assert int(kept.pop("memory.steps")) == STEPS * ROUNDS
        assert kept.keys() == own[client].keys()
        for kind in OWN:
            names = [n for n in kept if n.endswith(kind)]
            compare(((kept[n], own[client][n], plain.start[n]) for n in names), least=1e-3)


def test_a_layer_computes_the_formula_in_every_state(take_turn: Any) -> None:
    options = "method.options={rank=3, alpha=6.0}"
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[1, 2]]).expand(7, 2), torch.tensor([[0.6, 0.3]]).expand(7, 2)
    with take_turn("method.name=comigs", options) as (method, turn), torch.no_grad():
        outputs: dict[str, list[Any]] = {}
        for state in method.states:
            with method.in_state(turn, state):
                outputs[state] = [e.module(hidden, index, weights) for e in turn.site.experts]
        for i in (0, 1):
            start = PAIR.format(i)
            p = {n.removeprefix(start): t for n, t in turn.split.trained.items() if n.startswith(start)}
            G, F = (2.0 * hidden @ p[f"{k}.down"].T @ p[f"{k}.up"].T for k in ("shared", "personal"))
            a = torch.softmax(hidden @ p["gate.W"].T, -1)
            base = outputs["zero_shot"][i]
            assert torch.allclose(outputs["global"][i], base + G, atol=1e-5)
            assert torch.allclose(outputs["personalized"][i], base + a[:, :1] * G + a[:, 1:] * F, atol=1e-5)


def test_what_is_shared_and_what_stays(take_turn: Any) -> None:
    with take_turn("method.name=comigs") as (method, turn):
        pairs = {n for n in turn.split.shared if n.startswith("gated.")}
        assert pairs == {PAIR.format(i) + s for i in (0, 1) for s in ("shared.down", "shared.up")}
        assert all(n.startswith("base_model.") for n in turn.split.shared.keys() - pairs)
        assert set(turn.split.personal) == {PAIR.format(i) + s for i in (0, 1) for s in OWN}
        assert set(method.outgoing(turn)) == set(turn.split.shared)


def phases(take_turn: Any, monkeypatch: pytest.MonkeyPatch, options: str, rounds: Sequence[int]) -> list[Any]:
    """Return (what trains, steps, number of rows) of every phase of some rounds, of 2 steps each."""
    seen: list[Any] = []
    with take_turn("method.name=comigs", f"method.options={options}") as (method, turn):
        fit = type(turn).fit

        def spy(its: Any, **settings: Any) -> Any:
            router = settings["trains"]("gated.layers.x.gate.W")
            assert router != settings["trains"]("gated.layers.x.shared.up")
            seen.append(("router" if router else "experts", settings["settings"].steps, len(settings["examples"])))
            return fit(its, **settings)

        monkeypatch.setattr(type(turn), "fit", spy)
        for number in rounds:
            method.train(replace(turn, round=number, memory=turn.memory))
    return seen


def test_the_routers_steps_count_over_rounds(take_turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over rounds in which the client did not train: rounds 1, 2 and 7, of 8 rows."""
    found = phases(take_turn, monkeypatch, "{router_every=3, router_steps=4, validation=0.3}", (1, 2, 7))
    two, one, router = ("experts", 2, 6), ("experts", 1, 6), ("router", 4, 2)
    assert found == [two, one, router, one, two, router]


def test_the_router_shares_the_runs_cosine_with_the_experts(
    take_turn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a client that was away: in round 7 its second update is the run's fourth, of 20 steps."""
    places: list[tuple[int, int]] = []
    with take_turn("method.name=comigs", "method.options={router_every=3, router_steps=4}") as (method, turn):
        settle = type(method)._router_settings

        def spy(its: Any, settings: Any, done: int) -> Any:
            found = settle(its, settings, done)
            places.append((found.first_step, found.total_steps))
            return found

        monkeypatch.setattr(type(method), "_router_settings", spy)
        for number in (1, 2, 7):
            settings = replace(turn.settings, steps=2, first_step=2 * (number - 1), total_steps=20)
            method.train(replace(turn, round=number, settings=settings, memory=turn.memory))
    assert places == [(0, 24), (12, 24)]


def test_the_source_waits_for_thirty_steps_and_takes_ten(take_turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = phases(take_turn, monkeypatch, "{}", range(1, 16))
    assert [kind for kind, _, _ in found].count("router") == 1
    assert found[-1] == ("router", 10, 1)


def test_router_and_experts_never_share_a_row(take_turn: Any) -> None:
    with take_turn("method.name=comigs", "method.options={validation=0.5}") as (method, turn):
        rows, validation = method.sides(turn.site)
        assert (len(rows), len(validation)) == (4, 4)
        assert sorted([*map(id, rows), *map(id, validation)]) == sorted(map(id, turn.site.examples))
        assert {*map(id, rows)}.isdisjoint(map(id, validation))
        again = method.sides(turn.site)
        assert [list(map(id, side)) for side in again] == [list(map(id, side)) for side in (rows, validation)]
        one = replace(turn.site, examples=turn.site.examples[:1])
        assert [len(side) for side in method.sides(one)] == [1, 1]
        two = replace(turn.site, examples=turn.site.examples[:2])
        assert [len(side) for side in CoMiGS(CoMiGS.Options(validation=0.99)).sides(two)] == [1, 1]


def test_a_newcomer_trains_the_same_way_with_the_shared_part_frozen(take_turn: Any) -> None:
    with take_turn("method.name=comigs", "method.options={router_every=1, router_steps=1}") as (method, turn):
        before = {n: p.detach().clone() for n, p in turn.split.trained.items()}
        method.personalize(turn)
        assert all(torch.equal(p, before[n]) for n, p in turn.split.shared.items())
        assert not any(torch.equal(p, before[n]) for n, p in turn.split.personal.items())


@pytest.mark.parametrize("target", [0.5, 0.2])
def test_the_balance_loss_is_least_at_its_target(target: float) -> None:
    """Weights near 0 and 1: f and P are both the share of tokens that choose the shared expert."""
    losses = {}
    for share in range(11):
        weights = torch.tensor([[1.0, 0.0]] * share + [[0.0, 1.0]] * (10 - share))
        shares = Shares(target, {torch.nn.Module(): weights, torch.nn.Module(): weights})
        losses[share / 10] = float(shares.balance_loss())
        assert not shares.weights
    assert min(losses, key=lambda share: losses[share]) == target
    assert losses[target] == pytest.approx(1)
    assert losses[1.0] == pytest.approx(1 / target)


def test_all_phases_of_a_turn_share_its_seconds(take_turn: Any) -> None:
    """No time is left after the first step: it alone is taken, and counted."""
    settings = replace(SETTINGS, steps=6, seconds=1e-9)
    options = "method.options={router_every=2, router_steps=2}"
    with take_turn("method.name=comigs", options, settings=settings) as (method, turn):
        assert method.train(turn).steps == 1
        assert turn.memory["steps"] == 1
        turn.settings = replace(settings, seconds=None)
        assert method.train(turn).steps == 6 + 3 * 2
        assert turn.memory["steps"] == 7


def test_the_routers_steps_are_reported_and_its_loss_is_not(
    take_turn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    with take_turn("method.name=comigs", "method.options={router_every=1, router_steps=3}") as (method, turn):
        fit = type(turn).fit

        def spy(its: Any, **settings: Any) -> Any:
            fits.append(fit(its, **settings))
            return fits[-1]

        monkeypatch.setattr(type(turn), "fit", spy)
        result = method.train(turn)
    assert [each.steps for each in fits] == [1, 3, 1, 3]
    assert (result.steps, result.shared_steps) == (8, 2)
    assert result.tokens == sum(each.tokens for each in fits)
    assert result.loss == pytest.approx((fits[0].loss + fits[2].loss) / 2)
