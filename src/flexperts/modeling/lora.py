"""LoRA on the base's attention layers, by PEFT: a shared adapter and, if needed, a personal one."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import Parameter

from flexperts.config.model import LoraConfig
from flexperts.files import placeless, unwritable
from flexperts.modeling.joined_lora import JoinedLora
from flexperts.modeling.placement import offloaded, offloaded_left_there
from flexperts.moe.attention import attention_linears
from flexperts.seeding import seeded

SHARED_PREFIX = "base_model."
"""Prefix of the shared adapter's parameter names, as in PEFT's adapter files."""
PERSONAL_PREFIX = "personal."
"""Prefix of the personal adapter's parameter names."""
_ADAPTERS = {"shared": "default", "personal": "personal"}

Weight = float | Tensor
"""Factor of an adapter's output: one number, or one per row of the batch, ``[B]``."""


class LoraAdapters:
    """The adapters in one resident base, from construction until ``close``.

    Args:
        base: The base model.
        config: The recipe's section, the same for both adapters.
        seed: Seed of A; both adapters start with the same A, and B is zero.
        personal: Whether there is a personal adapter.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    def __init__(
        self, base: Any, config: LoraConfig, *, seed: int, personal: bool = False, checkpointing: bool = False
    ) -> None:
        self.base, self.checkpointing = base, checkpointing
        self.rank, self.scale = config.rank, config.alpha / config.rank
        self.targets = attention_linears(base, config.projections)
        self._config = peft_config(config, self.targets)
        # Every silo draws the same A, so that the first average starts from one model.
        with seeded(seed):
            self.model: Any = get_peft_model(base, self._config)
        if personal:
            with seeded(seed):
                self.model.add_adapter("personal", self._config)
        self.model.eval()
        self._joined = [JoinedLora(base.get_submodule(parent), layers) for parent, layers in self._by_input()]
        if checkpointing:
            # Where recomputing stopped early, inside an offloaded layer's experts, these would stay on the card.
            self.model.activation_checkpointing_enable({"use_reentrant": False, "early_stop": not offloaded(base)})
        self._weights: dict[str, Weight] = {}
        """The weights in use, by adapter; those that are 1 are left out."""
        self._initial = {n: p.detach().clone() for n, p in self.parameters().items()}
        self.reset()

    def close(self) -> None:
        """Remove LoRA from the base."""
        if self.checkpointing:
            self.base.activation_checkpointing_disable()
            self.base.disable_input_require_grads()  # PEFT and transformers enable it implicitly
        for joined in reversed(self._joined):
            joined.remove()
        with offloaded_left_there(self.base):
            self.model.unload()

    def parameters(self) -> dict[str, Parameter]:
        """Return both adapters' parameters by name."""
        return {_name(n): p for n, p in self.model.named_parameters() if "lora_" in n}

    def frozen(self) -> dict[str, Parameter]:
        """Return all other parameters of the model by name."""
        return {n: p for n, p in self.model.named_parameters() if "lora_" not in n}

    def module(self, target: str) -> nn.Module:
        """Return the adapted layer of a target module, which computes the layer with LoRA."""
        module: nn.Module = self.base.get_submodule(target)
        return module

    @torch.no_grad()
    def reset(self) -> None:
        """Reset all adapters to their initial values: all trainable, only the shared one in use."""
        for name, parameter in self.parameters().items():
            parameter.copy_(self._initial[name])
            parameter.requires_grad_(True)
            parameter.grad = None
        self._activate(["shared"])

    @contextmanager
    def use(self, **weights: Weight) -> Iterator[None]:
        """Use ``shared`` and ``personal`` with the given weights inside the block; an adapter not named is off.

        The weighted outputs are added: W0 x + a dW_shared x + b dW_personal x.
        """
        before = [name for name, adapter in _ADAPTERS.items() if adapter in self.model.active_adapters]
        trains = {n: p.requires_grad for n, p in self.parameters().items()}
        with ExitStack() as stack:
            stack.callback(self._let_train, trains)  # runs last, because PEFT changes requires_grad when it enables
            stack.callback(self._activate, before)
            self._activate(list(weights))
            for name, weight in weights.items():
                if isinstance(weight, Tensor) or weight != 1.0:
                    stack.enter_context(self._weighted(name, weight))
            if not weights:
                stack.enter_context(self.model.disable_adapter())
            yield

    def in_use(self) -> dict[str, list[tuple[Tensor, Tensor]]] | None:
        """Return by target the factors (A ``[r, in]``, B ``[out, r]`` times its scale) of the adapters in use.

        B contains the adapter's weight too. Return None where it differs from row to row of a batch.
        """
        weights = {_ADAPTERS[name]: weight for name, weight in self._weights.items()}
        if any(isinstance(weight, Tensor) for weight in weights.values()):
            return None
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for target in self.targets:
            layer: Any = self.module(target)
            used = [] if layer.disable_adapters else layer.active_adapters
            scales = {name: layer.scaling[name] * weights.get(name, 1.0) for name in used}
            pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight * scales[name]) for name in used]
            factors[target] = [(A.detach().clone(), B.detach()) for A, B in pairs]
        return factors

    def peft_entries(self, base: str) -> dict[str, Any]:
        """Return the entries of PEFT's adapter_config.json for the shared adapter, the same on every client."""
        return adapter_entries(self._config, base)

    def _by_input(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield the adapted layers of each module that have inputs of one width, with the module's name."""
        groups: dict[tuple[str, int], list[Any]] = defaultdict(list)
        for target in self.targets:
            layer: Any = self.module(target)
            groups[target.rpartition(".")[0], layer.in_features].append(layer)
        for (parent, _), layers in groups.items():
            yield parent, layers

    def _activate(self, names: list[str]) -> None:
        """Switch adapters, and undo PEFT's changes to requires_grad."""
        if not names:
            return
        trains = {n: p.requires_grad for n, p in self.parameters().items()}
        self.model.base_model.set_adapter([_ADAPTERS[name] for name in names])
        self._let_train(trains)

    def _let_train(self, trains: dict[str, bool]) -> None:
        for name, parameter in self.parameters().items():
            parameter.requires_grad_(trains[name])

    @contextmanager
    def _weighted(self, name: str, weight: Weight) -> Iterator[None]:
        """Multiply an adapter's contribution at the output of ``lora_B``, which PEFT computes last."""

        def scale(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            if isinstance(weight, Tensor):
                return output * weight.to(output).view(-1, *[1] * (output.dim() - 1))
            return output * weight

        handles = [self.module(t).lora_B[_ADAPTERS[name]].register_forward_hook(scale) for t in self.targets]  # type: ignore[index,union-attr]
        before = self._weights
        self._weights = {**before, name: weight}
        try:
            yield
        finally:
            self._weights = before
            for handle in handles:
                handle.remove()


def peft_config(config: LoraConfig, targets: Sequence[str]) -> PeftLoraConfig:
    """Return PEFT's configuration of the adapter that a recipe describes, on these target modules."""
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
    )


def adapter_entries(config: PeftLoraConfig, base: str) -> dict[str, Any]:
    """Return the entries of PEFT's adapter_config.json, the same on every machine.

    PEFT writes sets in random order, and the base as a local path. Here sets are sorted, and the path is removed
    because it may be private.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except OSError as error:
            raise unwritable(Path(folder), error) from error
        told: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return told | {"target_modules": sorted(told["target_modules"]), "base_model_name_or_path": placeless(base)}


def _name(name: str) -> str:
    """Return an adapter parameter's name in messages and files."""
    if ".personal." in name:
        return PERSONAL_PREFIX + name.replace(".personal.", ".")
    return name.replace(".default.", ".")
