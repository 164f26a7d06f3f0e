"""FLEx's rounds after the last one: who trains what at which rate, and what is sent in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexperts.config.run import RunConfig
from flexperts.costs.plan import plan
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.methods.flex import Flex
from flexperts.methods.kit import turn as turns
from flexperts.methods.kit.server_state import Server
from flexperts.methods.registry import make_method
from flexperts.parameters.vector import Payload

Recipe = Callable[..., RunConfig]
SHORT = ("training.local_steps=2", "evaluation.max_new_tokens=1", "evaluation.rows=1")
FINISH = "method.options={finish=2}"


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_the_extra_rounds_on_the_server() -> None:
    method = Flex(Flex.Options(finish=2))
    server = Server(Payload.of({"base_model.x": torch.ones(2)}), {"a": 1, "b": 1}, rounds=3, round=2)
    assert method.extra_rounds(3) == 2
    assert method.sends_weights(server)
    assert method.participants(server, ["b"]) == ["b"]
    assert method.uplink(server, "a") == server.shared.manifest
    before = server.shared.vector.copy()
    for server.round in (3, 4):
        assert not method.sends_weights(server)
        assert method.participants(server, ["b"]) == ["a", "b"]
        assert method.uplink(server, "a").size == 0
        replies = iter(["never looked at"])
        method.aggregate(server, replies)  # type: ignore[arg-type]
        assert next(replies, None) is None
        assert (server.shared.vector == before).all()
    assert Flex().sends_weights(server)


def test_without_extra_rounds_a_finished_run_declares_weights() -> None:
    server = Server(Payload.of({"base_model.x": torch.ones(2)}), {"a": 1}, rounds=3, round=3)
    assert Flex().uplink(server, "a") == server.shared.manifest


def test_the_personal_part_trains_alone_on_one_more_cosine(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds and two extra ones of two steps: each cosine is over four steps; the last one's peak is 3e-3."""
    seen: list[tuple[set[str], float]] = []
    real = turns.train_local

    def noted(model: Any, split: Any, *arguments: Any, **options: Any) -> Any:
        result = real(model, split, *arguments, **options)
        groups = {name for name in ("shared", "personal") if getattr(split, name)}
        seen.append((groups, result.lr_sum))
        return result

    monkeypatch.setattr(turns, "train_local", noted)
    rates = ("training.lr=2e-2", "training.personal_lr=3e-3", "federation.participation=0.5")
    run_federation(recipe(*SHORT, *rates, FINISH), tmp_path / "run")
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    pairs = [sum(cosine[:2]), sum(cosine[2:])]
    both = {"shared", "personal"}
    assert [groups for groups, _ in seen] == [both] * 4 + [{"personal"}] * 8
    expected = [2e-2 * pairs[0]] * 2 + [2e-2 * pairs[1]] * 2 + [3e-3 * pairs[0]] * 4 + [3e-3 * pairs[1]] * 4
    assert [rate for _, rate in seen] == pytest.approx(expected)

    logs = rounds_of(tmp_path / "run")
    assert [len(log["clients"]) for log in logs] == [2, 2, 4, 4]
    assert [set(log["declared"]["uplink"].values()) for log in logs[2:]] == [{0}, {0}]
    assert len(rounds_of(tmp_path / "run")) == 4


def test_means_of_bytes_are_of_messages_with_weights(recipe: Recipe, tmp_path: Path) -> None:
    """Rounds in which a method sends nothing would make it look cheaper than it is."""
    sent = {}
    for name, more in (("plain", ()), ("finish", (FINISH,)), ("local", ("method.name=local",))):
        sent[name] = run_federation(recipe(*SHORT, *more), tmp_path / name)["bytes"]
        sent[name]["rounds"] = rounds_of(tmp_path / name)
    first = sent["finish"]["rounds"][:2]
    assert sent["finish"]["uplink_per_client_per_round"] == sum(sum(log["uplink"].values()) for log in first) / 8
    assert sent["finish"]["groups"] == sent["plain"]["groups"]
    assert sent["finish"]["replies_with_weights"] == sent["plain"]["replies_with_weights"] == 8
    replies = [size for log in sent["local"]["rounds"] for size in log["uplink"].values()]
    assert sent["local"]["replies_with_weights"] == 0
    assert sent["local"]["uplink_per_client_per_round"] == sum(replies) / len(replies) > 0


def test_warm_up_is_the_recipes_share_of_the_extra_steps(take_turn: Any) -> None:
    with take_turn(FINISH, "training.warmup_ratio=0.5") as (method, turn):
        training = turn.settings.training.model_copy(update={"warmup_ratio": 0.5})
        settings = method._finishing(replace(turn.settings, training=training, steps=3), 2)
    assert (settings.first_step, settings.total_steps, settings.warmup_steps) == (3, 6, 3)


def test_the_shared_part_is_that_of_a_run_without_them(recipe: Recipe, tmp_path: Path) -> None:
    summaries = {}
    for name, more in (("plain", ()), ("finish", (FINISH,))):
        summaries[name] = run_federation(recipe(*SHORT, "training.lr=0.02", *more), tmp_path / name)
    folders = [tmp_path / name for name in summaries]
    adapters = [(folder / "shared" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert adapters[0] == adapters[1]
    before, after = (load_file(folder / "personal" / "shop.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    nll = {name: summary["mean"]["nll"] for name, summary in summaries.items()}
    assert nll["plain"]["global"] == nll["finish"]["global"]
    assert nll["plain"]["personalized"] != nll["finish"]["personalized"]


@pytest.mark.parametrize(
    "setting", ["privacy.noise=local", "privacy.noise=central", "federation.aggregation=median"]
)
def test_defences_work_on_the_other_rounds(recipe: Recipe, tmp_path: Path, setting: str) -> None:
    """Nothing is sent in extra rounds, so epsilon stays."""
    more = ("compression.kind=int8",) if "central" not in setting else ()
    summary = run_federation(recipe(*SHORT, FINISH, setting, *more), tmp_path / "run")
    logs = rounds_of(tmp_path / "run")
    assert [log["privacy"] for log in logs[2:]] == [logs[1]["privacy"]] * 2
    assert (logs[0]["privacy"] != logs[1]["privacy"]) == ("noise" in setting)
    assert summary["rounds"] == 4


def test_a_shared_graft_alone_has_nothing_to_finish(recipe: Recipe) -> None:
    config = recipe("graft.sharing=shared", FINISH)
    with pytest.raises(ConfigError, match="nothing personal to train after the last round"):
        make_method(config.method).check(config)


def test_a_run_with_extra_rounds_keeps_its_number_of_rounds(recipe: Recipe, tmp_path: Path) -> None:
    run_federation(recipe(*SHORT, FINISH), tmp_path / "run")
    with pytest.raises(ConfigError, match="flex trains 2 extra rounds after its last one"):
        run_federation(recipe(*SHORT, FINISH, "federation.rounds=3"), tmp_path / "run", resume=True)


def test_the_plan_has_them(tiny_base: Path) -> None:
    (row,) = plan(str(tiny_base), ["flex"], [FINISH, "federation.rounds=3"]).methods
    sent = [sum(sum(groups.values()) for groups in each.uplink.values()) for each in row.rounds]
    assert len(sent) == 5
    assert all(sent[:3])
    assert sent[3:] == [0, 0]
    (plain,) = plan(str(tiny_base), ["flex"], ["federation.rounds=3"]).methods
    for number in ("uplink", "downlink", "uplink_groups", "downlink_groups", "seconds", "at_server"):
        assert getattr(row, number) == getattr(plain, number), number
