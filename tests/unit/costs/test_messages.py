"""Planned messages against encoded ones, where a run is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flexperts.communication.compression import pack, packed_bytes
from flexperts.communication.messages import difference_records
from flexperts.communication.traffic import encoded_bytes
from flexperts.costs.messages import Encoded, PlannedRequest
from flexperts.methods.kit.server_state import Server
from flexperts.parameters.vector import Manifest, Payload
from flexperts.recipe import parse_recipe

SIZE = 100_000


@pytest.mark.parametrize("chain", [1, 4])
@pytest.mark.parametrize(
    ("kind", "fraction"),
    [("int8", 1), ("int4", 1), ("top_k", 0.01), ("top_k_int4", 0.01)]
    + [("top_k_sign", fraction) for fraction in (0.05, 0.01, 1)],
)
def test_a_chain_of_versions_is_planned_as_it_is_encoded(kind: str, fraction: float, chain: int) -> None:
    """Arrays of a run's differences are never equal, but for empty ones."""
    overrides = [f"compression.downlink={kind}", f"compression.fraction={fraction}"]
    config, stream = parse_recipe("data.silos = {}", overrides), np.random.default_rng(0)
    down = config.compression.down
    changes = [pack(stream.normal(size=SIZE).astype(np.float32), down) for _ in range(chain)]
    info = {"run": "a" * 32, "round": 5, "agreement": "null"}
    sent = encoded_bytes(difference_records(info, [f"{number:064x}" for number in range(chain + 1)], changes))

    encoded = Encoded(cast("Any", SimpleNamespace(method=None, config=config)))
    wanted = PlannedRequest(Manifest((), ()), chain * packed_bytes(SIZE, down), chain)
    made = encoded.training(Server(Payload.empty(), {}), 5, {"a": wanted}, {}, {}, {})
    assert made.down["a"] == pytest.approx(sent, rel=0.01)
