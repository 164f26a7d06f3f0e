"""Fixtures for methods: one client's turn without a federation, and adapters merged into weights by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexperts.client.model import ClientModel
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig, TrainingConfig
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Turn
from flexperts.methods.registry import make_method
from flexperts.training.local import LocalSettings

CLIENT = "clinic"
SETTINGS = LocalSettings(
    training=TrainingConfig(lr=0.1, max_grad_norm=1e9, optimizer="sgd"),
    precision="fp32",
    pad_token_id=258,
    steps=2,
    total_steps=10**9,  # so that the learning rate stands still
)


@pytest.fixture(autouse=True)
def _one_base(shared_base: None) -> None:
    """Load the base once for all methods' runs."""


@pytest.fixture
def take_turn(recipe: Callable[..., RunConfig]) -> Callable[..., Any]:
    """Return a function that lends the tiny model to one client; adapters have values unless asked otherwise."""

    @contextmanager
    def take(*overrides: str, disturbed: bool = True, **fields: Any) -> Iterator[tuple[Method, Turn]]:
        config = recipe(*overrides)
        workspace, method = Workspace(config), make_method(config.method)
        model = ClientModel(workspace.base, config, method)
        site = model.site(CLIENT, workspace.examples(CLIENT), None, fields.pop("agreement", None))
        site = replace(site, prepared=method.prepare(site))
        with model.lend(site, {}) as (split, parts):
            if disturbed:
                disturb(split.trained)
            received = {n: p.detach().clone() for n, p in split.shared.items()}
            known = {"round": 1, "received": received, "memory": {}, "settings": SETTINGS}
            stream = torch.Generator().manual_seed(0)
            yield method, Turn(site, split=split, parts=parts, stream=stream, **(known | fields))
        model.close()

    return take


def disturb(tensors: Mapping[str, Tensor]) -> None:
    """Give every tensor values of its own."""
    stream = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name in sorted(tensors):
            tensors[name].copy_(0.3 * torch.randn(tensors[name].shape, generator=stream))


@pytest.fixture
def merged(tiny_base: Path) -> Callable[..., Any]:
    """Return a function that gives the plain base with weights W0 + sum_k weight_k 2 B_k A_k (alpha / rank = 2)."""

    def merge(*adapters: tuple[float, Mapping[str, Tensor]]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        for weight, tensors in adapters:
            for name, a in tensors.items():
                if ".lora_A." in name:
                    b = tensors[name.replace(".lora_A.", ".lora_B.")]
                    site = name.removeprefix("personal.").removeprefix("base_model.model.")
                    target = model.get_submodule(site.removesuffix(".lora_A.weight")).weight
                    target.data += (weight * 2.0 * (b.double() @ a.double())).float()
        return model.eval()

    return merge


@pytest.fixture
def moves() -> Callable[..., Any]:
    """Return a function that makes an ``on_step`` which notes the groups that each optimizer step moved."""

    def watch(seen: list[set[str]], turn: Callable[[], Turn]) -> Callable[[float, int], None]:
        before: dict[str, Tensor] = {}

        def step(_loss: float, _tokens: int) -> None:
            split = turn().split
            now = {
                f"{g} {n}": p.detach().clone() for g in ("shared", "personal") for n, p in vars(split)[g].items()
            }
            seen.append({n.split()[0] for n in now if before and not torch.equal(now[n], before[n])})
            before.clear()
            before.update(now)

        return step

    return watch
