"""What serving a run needs: clients that fit beside the base, and a refusal where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexperts.costs import serving
from flexperts.costs.preflight import PROCESS
from flexperts.costs.serving import ServingMemory, serving_memory
from flexperts.errors import ModelError
from flexperts.recipe import parse_recipe

BASE = "olmoe-1b-7b"
PARAMETERS, EXPERTS = 6_919_161_856, 16 * (3 * 2048 * 1024 + 2049)
SHARED = 16 * 3 * 8 * (2048 + 2048)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ServingMemory:
    monkeypatch.setattr(serving, "resolve_base", lambda name: name)
    settings = f"model.base={BASE!r}", "model.device=cpu", "training.personal_moments=fresh"
    config = parse_recipe("data.silos = {}", settings)
    return serving_memory(config, ["a", "b", "c"], max_rows=16, max_tokens=16_384)


def test_parts_by_hand(memory: ServingMemory) -> None:
    assert memory.parts["base"] == 2 * PARAMETERS
    assert memory.parts["process"] == PROCESS
    cache = 2 * 2 * 16_384 * 16 * 2048  # keys and values in bf16, 16 layers, 16 heads of 128
    assert memory.parts["a batch"] > cache + 12 * 16 * 50_304
    assert memory.client == 2 * EXPERTS + torch.bfloat16.itemsize * SHARED
    assert memory.parts["one client's state while it is loaded"] == 4 * (EXPERTS + SHARED) + 4 * EXPERTS


def test_as_many_clients_as_fit_are_in_memory(memory: ServingMemory) -> None:
    fixed = sum(memory.parts.values())
    assert replace(memory, free=10**12).clients_in_memory(None) == 3
    two = replace(memory, free=fixed + 2 * memory.client + 1)
    assert two.clients_in_memory(None) == 2
    assert two.clients_in_memory(1) == 1
    with pytest.raises(ModelError, match=r"--max-clients 3: each client takes .* lower it to 2"):
        two.clients_in_memory(3)


def test_a_server_that_fits_no_client_is_refused(memory: ServingMemory) -> None:
    with pytest.raises(ModelError, match=r"base most of it: .* are free; lower --batch-tokens or --max-rows"):
        replace(memory, free=sum(memory.parts.values())).clients_in_memory(None)
