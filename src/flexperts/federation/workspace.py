"""What a process holds for all its runs and clients: the base in memory, the rows, and scores that never change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients, load_clients
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.errors import GraftError
from flexperts.grafting.rules import pick_layers
from flexperts.modeling.load import LoadedBase, load_base
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts

CLIENTS_KEPT = 64
"""Clients whose encoded rows, many times the size of their text, stay in memory between their turns."""


@dataclass
class Workspace:
    """Base, rows and encoder of a run, loaded once and shared with its reference run.

    Args:
        config: The run; its reference may differ in the method only.
        loaded: The base, where it is in memory already.
        untouched: What the untouched base scores, by what it was scored on: no method changes it.
        started_with: Refuses rows, when they are read, that are not those that a run started with.
    """

    config: RunConfig
    loaded: LoadedBase | None = None
    untouched: dict[str, Any] = field(default_factory=dict)
    started_with: Callable[[Clients], None] = lambda clients: None

    def for_run(self, config: RunConfig) -> Workspace:
        """Return the workspace of another run: this one, or one with rows or a base of its own."""
        if config.model != self.config.model:
            return Workspace(config)
        return self if _rows_of(config) == _rows_of(self.config) else Workspace(config, self.base, self.untouched)

    @cached_property
    def clients(self) -> Clients:
        """Every client's rows."""
        clients = load_clients(self.config.data, self.config.seed)
        self.started_with(clients)
        return clients

    @cached_property
    def base(self) -> LoadedBase:
        """The resident base."""
        return self.loaded or load_base(self.config.model)

    def examples(self, client: str) -> list[Example]:
        """Return a client's train rows, encoded; those of the last few clients are kept."""
        return self._examples(client)

    @cached_property
    def _examples(self) -> Callable[[str], list[Example]]:
        clients, encoder = self.clients, self.encoder
        return lru_cache(CLIENTS_KEPT)(lambda name: encoder.encode_all(clients[name].train))

    def check(self, config: RunConfig, *, needs_experts: bool) -> None:
        """Refuse what would otherwise fail in the middle of a run.

        Args:
            config: The run; it may differ from the workspace's where rows and base do not depend on it.
            needs_experts: Whether some method of the run works on experts.

        Raises:
            FlexpertsError: A row does not fit, the base cannot be grafted, or has too few experts or projections.
        """
        for name, rows in self.clients.items():
            self.examples(name)
            self.encoder.encode_all((*rows.test, *rows.validation))
        attention_linears(self.base.model, config.lora.projections)
        wanted, found = config.graft.experts, find_experts(self.base.model) if needs_experts else []
        pick_layers(found, config.graft.layers if found else ())
        for experts in found:
            if wanted > experts.num_experts:
                raise GraftError(
                    f"graft.experts = {wanted}", f"{experts.name} has {experts.num_experts}", "ask for fewer"
                )

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The one encoder of training, selection, evaluation and chat."""
        return PromptEncoder(self.base.tokenizer, self.config.model.template, self.config.training.max_length)


def _rows_of(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings that decide which rows a run has, and how they are encoded."""
    return config.seed, config.data, config.training.max_length
