"""Every registered method through the in-process grid: what it declares, what it sends, what it leaves alone.

Two rounds of every method on a tiny model. One whole run serves several checks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from flexperts.artifacts import RunDirectory
from flexperts.cli.methods import methods_page
from flexperts.client.workspace import Workspace
from flexperts.communication.traffic import encoded_objects
from flexperts.config.run import RunConfig
from flexperts.engines.grid import InProcessGrid
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError
from flexperts.files import LOCK
from flexperts.finished.trained import TrainedRun
from flexperts.methods.registry import make_method, method_class, method_names
from flexperts.observer import Observer
from flexperts.status.status import RunStatus
from flexperts.testing import METHOD_SETTINGS

Recipe = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]

FLEX: dict[str, tuple[str, ...]] = {
    "flex, as published": ("graft.output=expert", "training.personal_moments=fresh"),
    "flex, two experts": ("graft.experts=2",),
    "flex, four experts of low rank": ("graft.experts=4", "graft.rank=2"),
    "flex, greedy mixture": ("graft.experts=2", "graft.selection=greedy", "graft.scale=least_squares"),
    **{
        f"flex, {rule}": (f"graft.selection={rule}",)
        for rule in ("scaled", "frequency", "router_weight", "random", "exhaustive")
    },
    "flex, in place": ("graft.place=in_place",),
    "flex, shared graft": ("graft.sharing=shared",),
    "flex, shared and personal graft": ("graft.sharing=both", "graft.rank=2"),
    "flex, last layer": ("graft.layers=[-1]",),
    "flex, gate nearly closed": ("graft.gate_bias=-4.0",),
    "flex, gate from the router": ("graft.gate_start=router",),
    "flex, silent start": ("graft.start=silent",),
    "flex, differences": ("graft.output=difference", "graft.experts=2"),
    "flex, shared and personal differences": ("graft.output=difference", "graft.sharing=both", "graft.rank=2"),
    "flex, dropout": ("graft.dropout=0.5",),
    "flex, alternating": ('method.options={phases="alternating"}',),
    "flex, pull": ("method.options={pull=0.1}",),
    "flex, two more rounds": ("method.options={finish=2}", "federation.participation=0.5"),
    "flex, truncated mean": ('method.options={aggregation="truncated"}', "graft.sharing=both", "graft.rank=2"),
    "flex, gates of their own rate": ("graft.gate_lr=0.1",),
    **{
        f"{method}, kept moments": (f"method.name={method}", "training.personal_moments=kept", *more)
        for method, more in {
            "flex": ('method.options={phases="alternating", finish=1}', "graft.dropout=0.5"),
            "local": ("federation.participation=0.5",),
            "local_lora": (),
            "feddpa_t": (),
        }.items()
    },
}
OTHERS = {
    "comigs, a router that learns in every step": (
        "method.name=comigs",
        "method.options={router_every=1, router_steps=2, validation=0.5}",
    ),
    "fedex_lora, half of the clients": ("method.name=fedex_lora", "federation.participation=0.5"),
}
VARIANTS = {name: (f"method.name={name}", *METHOD_SETTINGS.get(name, ())) for name in method_names()}
VARIANTS |= FLEX | OTHERS
# The fixed part of a message: field names, ids, the compressed manifest.
OVERHEAD = 6000


def variant(recipe: Recipe, name: str, *more: str) -> RunConfig:
    return recipe(*VARIANTS[name], "training.local_steps=2", "evaluation.max_new_tokens=2", *more)


def files(folder: Path) -> dict[str, bytes]:
    kept = ("*.safetensors", "predictions/*")
    return {str(p.relative_to(folder)): p.read_bytes() for k in kept for p in sorted(folder.rglob(k))}


def looked(folder: Path) -> int:
    """The number of rounds that ``flexperts status`` and the page of the run show."""
    return int(RunStatus(RunDirectory.open(folder)).look()["rounds"]["planned"])


class Copier(Observer):
    """Copies the run as it is on disk after round 1, which is what a kill leaves; keeps what is told of rounds."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy, self.told = folder, copy, set[int]()

    def phase(self, name: str, clients: int, number: int = 0, rounds: int = 0) -> None:
        if number:
            self.told |= {rounds, looked(self.folder)}

    def round(self, record: Any) -> None:
        if record["number"] == 1:
            shutil.copytree(self.folder, self.copy, ignore=shutil.ignore_patterns(LOCK))


def test_the_matrix_holds_every_method() -> None:
    assert len(VARIANTS) >= len(method_names()) >= 25
    assert {method_class(name).name for name in method_names()} == set(method_names())


@pytest.fixture(scope="module")
def workspace(recipe: Recipe) -> Workspace:
    return Workspace(variant(recipe, "fedavg"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_keeps_its_word(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bytes are as declared, nothing personal is sent, nothing frozen moves, a resumed run is the same."""
    config = variant(recipe, name)
    before = {n: t.clone() for n, t in workspace.base.model.state_dict().items()}
    hooks = count_hooks(workspace.base.model)
    replies = record_replies(monkeypatch)
    copier = Copier(tmp_path / "whole", tmp_path / "broken")
    summary = run_federation(config, tmp_path / "whole", copier, workspace=workspace)

    rounds = [json.loads(line) for line in (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) >= 2
    assert copier.told | {looked(tmp_path / "whole"), looked(tmp_path / "broken")} == {summary["rounds"]}
    for direction in ("uplink", "downlink"):
        for log in rounds:
            assert log[direction].keys() == log["declared"][direction].keys()
            for client, size in log[direction].items():
                assert log["declared"][direction][client] <= size <= log["declared"][direction][client] + OVERHEAD
    assert summary["bytes"]["personal_sent"] == 0
    check_nothing_personal(tmp_path / "whole", replies, workspace)

    after = workspace.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert count_hooks(workspace.base.model) == hooks

    assert len((tmp_path / "broken" / "rounds.jsonl").read_text().splitlines()) == 1
    run_federation(config, tmp_path / "broken", resume=True, workspace=workspace)
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert [n for n in whole if whole[n] != resumed[n]] == []
    check_trained_run(tmp_path / "whole", summary, workspace, monkeypatch)


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def record_replies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Collect the encoded bytes of every reply that any client sends."""
    seen: list[tuple[str, bytes]] = []
    deliver = InProcessGrid._deliver

    def spy(grid: InProcessGrid, message: Message) -> Message:
        reply = deliver(grid, message)
        whole = [a.data for r in reply.content.array_records.values() for a in r.values()]
        seen.append((message.metadata.message_type, b"".join([*encoded_objects(reply.content), *whole])))
        return reply

    monkeypatch.setattr(InProcessGrid, "_deliver", spy)
    return seen


def check_nothing_personal(run: Path, replies: list[tuple[str, bytes]], workspace: Workspace) -> None:
    """Search all replies for every personal tensor as it lies on disk, of both generations."""
    sent = b"".join(reply for _, reply in replies)
    for path in (run / "personal").rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().lstrip(b"\0")[:256]
            if not name.startswith("memory.") and len(raw) >= 16:
                assert raw not in sent, f"{path.name}: {name}"


def check_trained_run(run: Path, summary: Any, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run, loaded from its files, scores what the summary says."""
    monkeypatch.setattr("flexperts.finished.trained.Workspace", lambda config, **_: workspace)
    trained = TrainedRun(run)
    client = trained.clients[0]
    for state, scores in (
        trained.client(client).evaluate(trained.request(client), trained.model.method.states).items()
    ):
        assert scores.nll == summary["clients"][client]["nll"][state]
    if trained.model.method.one_global and "global" in trained.model.method.states:
        first, *others = (trained.request(name).payload for name in trained.clients)
        assert all(other.manifest == first.manifest for other in others)
        assert all(torch.equal(t, first.tensors()[n]) for other in others for n, t in other.tensors().items())
    trained.model.close()


@pytest.mark.parametrize("name", method_names())
def test_a_method_says_what_it_is(name: str) -> None:
    method = method_class(name)
    doc = method.__doc__ or ""
    for word in ("Source:", "Trained:", "Inference:"):
        assert word in doc, f"{name}: {word}"
    assert method.summary
    assert method.source
    assert method.sends
    assert method.keeps
    for option, field in method.Options.model_fields.items():
        assert field.description, f"{name}.{option}"


def test_unknown_names_are_answered_with_the_nearest(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedprox'"):
        run_federation(recipe("method.name=fedpro"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no option .m. .did you mean .mu."):
        make_method(recipe("method.name=fedprox", "method.options={m=1}").method)
    assert not (tmp_path / "run").exists()


def test_the_page_of_methods_is_current() -> None:
    page = ROOT / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == methods_page(), "run: flexperts methods --markdown > docs/methods.md"
    assert f"{len(method_names())} methods" in (ROOT / "README.md").read_text(encoding="utf-8")
