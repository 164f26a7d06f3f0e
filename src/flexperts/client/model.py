"""The model that clients use in turn: one resident base, its adapters, and the current client's parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flexperts.config.federation import CompressionConfig, PrivacyConfig
from flexperts.config.run import RunConfig
from flexperts.data.prompts import Example
from flexperts.errors import FederationError, GraftError
from flexperts.methods.kit.method import Method, named_parameters
from flexperts.methods.kit.turn import Prepared, Site
from flexperts.methods.registry import make_method
from flexperts.modeling.load import LoadedBase
from flexperts.modeling.lora import PERSONAL_PREFIX, LoraAdapters
from flexperts.moe.experts import find_experts
from flexperts.parameters.split import ParameterSplit, split_parameters
from flexperts.parameters.vector import copy_tensors
from flexperts.parts.part import Part
from flexperts.seeding import derive_seed


class ClientModel:
    """The resident base, which one client uses at a time.

    Args:
        base: The resident base; it has LoRA adapters until ``close``.
        config: The run.
        method: Decides which parts are attached to the base, and which parameters are shared or personal.
    """

    def __init__(self, base: LoadedBase, config: RunConfig, method: Method) -> None:
        self.base, self.config, self.method = base, config, method
        self.experts = find_experts(base.model) if method.needs_experts else []
        self.lora = LoraAdapters(
            base.model,
            config.lora,
            seed=derive_seed(config.seed, "lora"),
            personal=method.has_personal_lora,
            checkpointing=config.training.gradient_checkpointing,
        )
        self.lent: dict[str, Part] | None = None
        """The parts of the client that uses the model now; None while it is free."""

    def close(self) -> None:
        """Remove the LoRA adapters from the base."""
        self.lora.close()

    def alone(self, config: RunConfig) -> ClientModel:
        """Return a model on the same base and adapters, on which clients train without a server.

        Its method shares nothing, so that no split of it has a tensor that could be encoded. Defences of an update
        are off: there is none. It has the rounds of the method's ``turns``.

        Args:
            config: The client's run.
        """
        config, other = config.with_method(self.method.alone), copy.copy(self)
        off = {"privacy": PrivacyConfig(), "compression": CompressionConfig(), "protections": {}}
        graft = config.graft.model_copy(update={"sharing": "personal"})
        rate = config.floor.local_lr if config.floor else None
        training = config.training.model_copy(update={"personal_lr": rate or config.training.personal_lr})
        federation = config.federation.model_copy(update={"rounds": self.method.turns(config)})
        other.config = config.model_copy(
            update={**off, "graft": graft, "training": training, "federation": federation}
        )
        other.method, other.lent = make_method(other.config.method), None
        return other

    @property
    def _is_spread(self) -> bool:
        """Whether the base's layers are on several cards."""
        return len({p.device for p in self.base.model.parameters() if not p.is_meta}) > 1

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return torch.device(next(self.base.model.parameters()).device)

    def site(
        self, client: str, examples: Sequence[Example], prepared: Prepared | None = None, agreement: Any = None
    ) -> Site:
        """Return a client's place on the base."""
        return Site(
            client,
            self.config,
            self.lora,
            self.experts,
            examples,
            self.base.tokenizer.pad_token_id,
            prepared or Prepared(),
            agreement,
        )

    @contextmanager
    def lend(self, site: Site, personal: Mapping[str, Tensor]) -> Iterator[tuple[ParameterSplit, dict[str, Part]]]:
        """Set the model up for one client inside the block: initial LoRA, its parts, its personal state.

        Args:
            site: The client's place.
            personal: Its stored personal tensors; empty before its first round.
        """
        if self.lent is not None:
            raise GraftError("the resident model", "another client uses it", "wait until that client is done")
        parts: dict[str, Part] = {}
        self.lent = parts
        try:
            self.lora.reset()
            made = self.method.parts(site)
            # Over several cards a part is where its layer is.
            parts |= made if self._is_spread else {name: part.to(self.device) for name, part in made.items()}
            split = self._split(parts)
            if personal:
                _load_personal(personal, split.personal)
            for part in parts.values():
                part.attach()
            yield split, parts
        finally:
            for part in parts.values():
                part.detach()
            self.lent = None

    def _split(self, parts: Mapping[str, Part]) -> ParameterSplit:
        added = self.lora.parameters() | named_parameters(parts)
        for name, parameter in added.items():
            idle = name.startswith(PERSONAL_PREFIX) and not self.method.has_personal_lora  # see ``alone``
            parameter.requires_grad_(self.method.trains(name) and not idle)
        parameters = self.lora.frozen() | added
        trained = {n for n, p in parameters.items() if p.requires_grad}
        shared = self.method.shared(trained)
        return split_parameters(parameters, shared, trained - shared)


def _load_personal(stored: Mapping[str, Tensor], personal: Mapping[str, Parameter]) -> None:
    try:
        copy_tensors(stored, personal)
    except FederationError as error:
        raise GraftError(
            f"personal state: {error.value}",
            "a personal state only fits the graft settings that it was trained with",
            "use the config of the run that it belongs to, or delete the client's personal file to start it anew",
        ) from error
