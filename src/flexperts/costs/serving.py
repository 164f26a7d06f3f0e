"""Check before a run is served that it fits this machine's memory, and how many clients' models fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexperts.config.run import RunConfig
from flexperts.costs.activations import Activations, Lengths
from flexperts.costs.models import describe, meta_base
from flexperts.costs.plan import model_facts, plan_method
from flexperts.costs.preflight import PROCESS, gigabytes, on_device
from flexperts.errors import ModelError
from flexperts.modeling.chunked_losses import LOGIT_BYTES
from flexperts.modeling.memory import free_bytes
from flexperts.modeling.placement import computing_device
from flexperts.smol_moe.build import resolve_base

_REMEDY = "lower --batch-tokens or --max-rows, free memory, or add --no-preflight to try anyway"


@dataclass(frozen=True)
class ServingMemory:
    """Memory of a server.

    Args:
        parts: Kind of memory -> bytes, without clients' models; loading one client's state is among them.
        client: Bytes that one client's models take while they are in memory.
        clients: Number of the run's clients.
        device: The computing device.
        free: Its free bytes.
    """

    parts: dict[str, int]
    client: int
    clients: int
    device: str
    free: int

    @property
    def fit(self) -> int:
        """Most clients whose models fit beside all else; 0 if the base does not."""
        left = self.free - sum(self.parts.values())
        return self.clients if left >= self.client * self.clients else max(0, left // self.client)

    def clients_in_memory(self, asked: int | None) -> int:
        """Return how many clients' models may be in memory; by default as many as fit.

        Raises:
            ModelError: Not one fits, or fewer than ``asked``.
        """
        if self.fit < 1:
            needed = sum(self.parts.values()) + self.client
            most = max(self.parts, key=lambda part: self.parts[part])
            raise ModelError(
                f"serving this run needs {gigabytes(needed)} on {self.device}, {most} most of it",
                f"{gigabytes(self.free)} are free",
                _REMEDY,
            )
        if asked is not None and min(asked, self.clients) > self.fit:
            raise ModelError(
                f"--max-clients {asked}",
                f"each client takes {gigabytes(self.client)}, and {gigabytes(self.free)} are free on {self.device}",
                f"lower it to {self.fit}, or add --no-preflight to try anyway",
            )
        return min(asked or self.fit, self.clients)


def serving_memory(config: RunConfig, clients: Sequence[str], *, max_rows: int, max_tokens: int) -> ServingMemory:
    """Return the memory that serving a run needs, estimated from its base's config and its method's code.

    Args:
        config: The run.
        clients: Names of its clients.
        max_rows, max_tokens: As for ``open_engine``.
    """
    description = describe(resolve_base(config.model.base))
    base, device = meta_base(description, config.model.dtype), computing_device(config.model.device)
    facts = model_facts(description, base)
    passing = Activations(base.model, config, Lengths(1, 1), facts.experts_per_token)
    planned, on_cpu = plan_method(base, facts, config, clients, bandwidth=1.0), device.type == "cpu"
    whole = getattr(torch, config.model.dtype).itemsize if config.graft.rank == "full" else torch.float32.itemsize
    computed = torch.bfloat16.itemsize if config.model.precision == "bf16" else torch.float32.itemsize
    vocabulary: int = base.model.config.get_text_config().vocab_size
    parts = {
        "base": on_device(config, description, base, device),
        "process": PROCESS if on_cpu else 0,
        "a batch": passing.reading(max_tokens) + LOGIT_BYTES * max_rows * vocabulary,
        "one client's state while it is loaded": planned.memory.added + (planned.personal_state if on_cpu else 0),
    }
    client = max(1, whole * planned.personal + computed * planned.shared)
    return ServingMemory(parts, client, len(clients), str(device), free_bytes(device))
