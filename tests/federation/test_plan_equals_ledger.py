"""The planner against real runs: what it says from a config alone is what a run of the same recipe logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexperts.client.client import Client, Request, Trained
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.costs.models import describe, meta_base
from flexperts.costs.plan import MethodPlan, model_facts, plan_method
from flexperts.engines.run import run_federation
from flexperts.methods.registry import method_class, method_names
from flexperts.testing import METHOD_SETTINGS

Recipe = Callable[..., RunConfig]
BANDWIDTH = 10.0
WRAPPING = 4_000
"""Bytes that a message has beside its payload's values: metrics, the manifest, Flower's objects."""
VARIANTS = {name: (f"method.name={name}", *METHOD_SETTINGS.get(name, ())) for name in method_names()} | {
    "flex, two of low rank": ("graft.experts=2", "graft.rank=2"),
    "flex, greedy, fitted": ("graft.experts=2", "graft.selection=greedy", "graft.scale=least_squares"),
    "flex, shared graft of one layer": ("graft.sharing=shared", "graft.layers=[-1]"),
    "flex, in place": ("graft.place=in_place",),
    "hetlora, ranks": ("method.name=hetlora", "method.options={ranks={help_desk=3, clinic=1}, gamma=1.0}"),
    "fedmoe_da, whole experts": ("method.name=fedmoe_da", 'method.options={rank="full", every=2}'),
    "fedmoe_style, three experts": ("method.name=fedmoe_style", "method.options={keep=0.75}"),
    "fedex_lora, four rounds": ("method.name=fedex_lora", "federation.rounds=4", "lora.rank=4"),
    "fedavg, half of the clients": ("method.name=fedavg", "federation.participation=0.5"),
    "fedavg, buffered, half of the clients": (
        "method.name=fedavg",
        "federation.mode=buffered",
        "federation.buffer=2",
        "federation.rounds=3",
        "federation.step_seconds={clinic=2.5}",
    ),
}
GROUPS = {"attention LoRA A", "attention LoRA B", "experts", "routers", "gates"}
INEXACT = {"hetlora": "bound", "fedlease": "bound", "fedamole": "mean"}


@pytest.fixture(scope="module")
def shared_workspaces() -> dict[str, Workspace]:
    """One base and one set of rows for all runs of this file."""
    return {}


def planned(config: RunConfig, base: Path, clients: list[str]) -> MethodPlan:
    description = describe(str(base))
    model = meta_base(description, config.model.dtype)
    return plan_method(model, model_facts(description, model), config, clients, BANDWIDTH)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_plan_is_what_the_run_logs(
    recipe: Recipe,
    tiny_base: Path,
    tmp_path: Path,
    shared_workspaces: dict[str, Workspace],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    fast = ("training.local_steps=1", "evaluation.rows=1", "evaluation.max_new_tokens=2")
    config = recipe(*VARIANTS[name], *fast)
    workspace = shared_workspaces.setdefault("all", Workspace(config))
    trained = record_trained(monkeypatch)
    run_federation(config, tmp_path / "run", workspace=workspace)
    logs = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]

    plan = planned(config, tiny_base, sorted(workspace.clients))
    assert trained <= {(plan.shared, plan.personal)}
    assert trained or plan.shared == plan.personal == 0
    assert [r.number for r in plan.rounds] == [log["number"] for log in logs]
    check_bytes(plan, logs, INEXACT.get(name, "all" if "buffered" not in name else "sizes"))
    if name not in INEXACT:
        check_means(plan, logs)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "run" / "personal").glob("*.safetensors"))
    assert plan.personal_state * len(workspace.clients) <= on_disk
    assert bool(plan.note) == bool(method_class(config.method.name).plan_note)


def record_trained(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Collect what clients really train: shared and personal parameters."""
    seen: set[tuple[int, int]] = set()
    train = Client.train

    def spy(client: Client, request: Request) -> Trained:
        trained = train(client, request)
        sizes = [sum(p.numel() for p in group.values()) for group in (trained.split.shared, trained.split.personal)]
        seen.add((sizes[0], sizes[1]))
        return trained

    monkeypatch.setattr(Client, "train", spy)
    return seen


def check_bytes(plan: MethodPlan, logs: list[Any], how: str) -> None:
    for ours, log in zip(plan.rounds, logs, strict=True):
        for direction, mine in (("uplink", ours.uplink), ("downlink", ours.downlink)):
            groups, declared = log["groups"][direction], log["declared"][direction]
            sums = {client: sum(sizes.values()) for client, sizes in mine.items()}
            assert all(g in GROUPS or g.startswith("derived ") for sizes in groups.values() for g in sizes)
            if how == "all":
                assert mine == groups
                assert sums == declared
            elif how == "sizes":
                assert sorted(map(str, mine.values())) == sorted(map(str, groups.values()))
            elif how == "bound":
                assert sums.keys() == declared.keys()
                assert all(declared[client] <= size for client, size in sums.items())
            else:
                assert sum(sums.values()) == sum(declared.values())


def check_means(plan: MethodPlan, logs: list[Any]) -> None:
    for direction, mean in (("uplink", plan.uplink), ("downlink", plan.downlink)):
        sizes = [size for log in logs for size in log["declared"][direction].values() if size]
        assert mean == pytest.approx(sum(sizes) / max(1, len(sizes)))
    assert plan.seconds == pytest.approx(8 * (plan.uplink + plan.downlink) / (BANDWIDTH * 1e6))


@pytest.mark.parametrize("kind", ["none", "fp16", "int8", "top_k"])
def test_packed_replies_are_planned_as_they_are_sent(
    recipe: Recipe, tiny_base: Path, tmp_path: Path, shared_workspaces: dict[str, Workspace], kind: str
) -> None:
    config = recipe(f"compression.kind={kind}", "training.local_steps=1", "evaluation.rows=1")
    workspace = shared_workspaces.setdefault("all", Workspace(config))
    run_federation(config, tmp_path / "run", workspace=workspace)
    log = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])

    plan = planned(config, tiny_base, sorted(workspace.clients))
    sent = [*log["uplink"].values()]
    wrapping = [size - plan.uplink for size in sent]
    assert 0 < min(wrapping) <= max(wrapping) < WRAPPING
    assert plan.at_server == pytest.approx(len(sent) * (plan.uplink + plan.downlink))
    unpacked = sum(plan.uplink_groups.values())
    assert plan.uplink == unpacked if kind == "none" else plan.uplink < 0.6 * unpacked


PACKINGS = {
    "none": (),
    "both": ("compression.kind=top_k_sign", "compression.fraction=0.5", "compression.downlink=int4"),
    "both, evaluated": ("compression.kind=top_k_int4", "compression.downlink=int8", "evaluation.every=1"),
    "few take part": ("compression.downlink=int8", "federation.participation=0.5", "evaluation.clients=1"),
    "one takes part": ("compression.downlink=int8", "federation.participation=0.25", "federation.rounds=8"),
    "two take part": (
        "compression.downlink=int8",
        "federation.participation=0.5",
        "federation.rounds=6",
        "evaluation.clients=2",
        "evaluation.every=2",
    ),
    "many rounds": ("compression.kind=int4", "compression.downlink=int8", "federation.rounds=5"),
    "with a start of its own": ("method.name=ffa_lora", "compression.downlink=int4", "federation.rounds=3"),
    "a round of no change": (
        "compression.downlink=int4",
        "federation.rounds=4",
        "training.warmup_ratio=0.25",
        "training.local_steps=1",
    ),
    "an extra round": ("method.name=flex", "method.options.finish=1", "compression.downlink=int4"),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_the_encoded_messages_of_a_run_are_planned_to_one_percent(
    recipe: Recipe, tiny_base: Path, tmp_path: Path, shared_workspaces: dict[str, Workspace], name: str
) -> None:
    """On a LoRA of some 100 kB: below that a message's own few bytes would not be small."""
    fast = ("training.local_steps=1", "evaluation.rows=1", "evaluation.max_new_tokens=1", "lora.rank=128")
    config = recipe("method.name=fedavg", *fast, *PACKINGS[name])
    workspace = shared_workspaces.setdefault("all", Workspace(config))
    run_federation(config, tmp_path / "run", workspace=workspace)
    logs = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]

    plan = planned(config, tiny_base, sorted(workspace.clients))
    for direction, whole in (("uplink", plan.run_up), ("downlink", plan.run_down)):
        found = sum(sum(log[direction].values()) + sum(log["evaluation"][direction].values()) for log in logs)
        assert whole == pytest.approx(found, rel=0.01), direction
