"""The model that clients take turns on: one resident base, one LoRA adapter, and the current client's grafts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import Parameter

from flexperts.config import RunConfig
from flexperts.errors import GraftError
from flexperts.grafting.grafts import Choice, Grafts
from flexperts.methods.base import GRAFT_PREFIX, Method
from flexperts.modeling.load import LoadedBase
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.parameters.split import ParameterSplit, split_parameters
from flexperts.parameters.vector import Manifest
from flexperts.seeding import derive_seed, generator


class ClientModel:
    """Lends the base to one client at a time.

    Args:
        base: The resident base; LoRA is put into it until ``close``.
        config: The run.
        method: Decides whether clients graft, and who owns what.

    Raises:
        ModelError: The method grafts and the base has no experts that can be grafted.
        ConfigError: No attention layer fits ``lora.projections``.
    """

    def __init__(self, base: LoadedBase, config: RunConfig, method: Method) -> None:
        self.base, self.config, self.method = base, config, method
        self.experts = find_experts(base.model) if method.grafts else []
        targets = attention_linears(base.model, config.lora.projections)
        self._lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):
            # Every silo draws the same A, so that the first average starts from one model.
            torch.manual_seed(derive_seed(config.seed, "lora"))
            self.model: Any = get_peft_model(base.model, self._lora)
        self.model.eval()
        if config.training.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._initial = {n: p.detach().clone() for n, p in self._lora_parameters().items()}
        self._lent = False

    def close(self) -> None:
        """Take LoRA out of the base again."""
        if self.config.training.gradient_checkpointing:
            self.base.model.activation_checkpointing_disable()
            self.base.model.disable_input_require_grads()  # enabled by PEFT and transformers behind our back
        self.model.unload()

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        return torch.device(next(self.base.model.parameters()).device)

    @property
    def manifest(self) -> Manifest:
        """Names and shapes of the shared weights."""
        return Manifest.of({n: p for n, p in self._lora_parameters().items() if self.method.is_shared(n)})

    def grafts(self, client: str, choice: Choice) -> Grafts:
        """Make a client's grafts as they are before any training."""
        settings = self.config.graft
        return Grafts(
            self.experts,
            choice,
            rank=settings.rank,
            alpha=settings.alpha,
            gate_bias=settings.gate_bias,
            generator=generator(self.config.seed, client, "graft"),
        )

    @contextmanager
    def lend(self, grafts: Grafts | None, personal: Mapping[str, Tensor]) -> Iterator[ParameterSplit]:
        """Set the model up for one client inside the block: initial LoRA, its grafts, its personal state.

        Args:
            grafts: The client's grafts, or None for a method without.
            personal: Its stored personal tensors; empty before its first round.

        Raises:
            GraftError: The personal tensors do not fit, or the model is lent already.
        """
        if self._lent:
            raise GraftError("the resident model", "it is lent to another client", "wait for its turn to end")
        self._lent = True
        try:
            with torch.no_grad():
                for name, parameter in self._lora_parameters().items():
                    parameter.copy_(self._initial[name])
            split = self._split(grafts)
            load_tensors(personal, split.personal)
            if grafts is not None:
                grafts.attach()
            yield split
        finally:
            if grafts is not None:
                grafts.detach()
            self._lent = False

    def adapter_config(self) -> str:
        """Return the text of PEFT's adapter_config.json for the shared adapter, the same on every client.

        PEFT writes sets in random order and the base as a local path: neither may differ or be told.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.model.peft_config["default"].save_pretrained(folder)
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        base = self.config.model.base
        config["base_model_name_or_path"] = Path(base).name if Path(base).is_absolute() else base
        return json.dumps(config, indent=2, sort_keys=True)

    def _lora_parameters(self) -> dict[str, Parameter]:
        """LoRA's parameters under the names that PEFT's own adapter files use."""
        named = self.model.named_parameters()
        return {n.replace(".default.", "."): p for n, p in named if ".default." in n and "lora_" in n}

    def _split(self, grafts: Grafts | None) -> ParameterSplit:
        parameters = {n.replace(".default.", "."): p for n, p in self.model.named_parameters()}
        if grafts is not None:
            parameters |= {f"{GRAFT_PREFIX}{n}": p for n, p in grafts.named_parameters()}
        trainable = [n for n, p in parameters.items() if p.requires_grad]
        shared = [n for n in trainable if self.method.is_shared(n)]
        return split_parameters(parameters, shared, set(trainable) - set(shared))


@torch.no_grad()
def load_tensors(source: Mapping[str, Tensor], target: Mapping[str, Parameter]) -> None:
    """Copy stored personal tensors into a split's personal group; an empty source leaves the initial values.

    Raises:
        GraftError: Names or shapes differ.
    """
    if not source:
        return
    ours = {n: tuple(p.shape) for n, p in target.items()}
    theirs = {n: tuple(t.shape) for n, t in source.items()}
    if ours != theirs:
        odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise GraftError(
            f"personal state: {odd[0]} is {theirs.get(odd[0])}, the model has {ours.get(odd[0])}",
            "a personal state fits the graft settings that it was trained with",
            "use the run's own config, or start the client afresh",
        )
    for name, tensor in source.items():
        target[name].copy_(tensor)
