"""Memory of a model's activations in bytes, estimated from its shapes.

The factors are the bytes that autograd keeps per value, counted with bf16 autocast on OLMoE; fp32 doubles them.
Shapes: D width, I an expert's intermediate width, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from flexperts.client.answer_limit import chosen_limit
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.rows import ClientRows
from flexperts.methods.registry import make_method
from flexperts.modeling.chunked_losses import LOGIT_BYTES, MOST_BYTES
from flexperts.moe.attention import attention_modules
from flexperts.moe.experts import find_experts
from flexperts.moe.fused import AT_ONCE
from flexperts.selection.selection import STACK, TOKENS

_LAYER = 31
"""Per D and layer: norms, residuals, attention with LoRA."""
_INTO, _INSIDE = 2, 6
"""Per D and per I of each of the K experts."""
_GRAFT_INTO, _GRAFT_INSIDE = 4, 8
"""The same for a grafted expert, with its gate."""
_PASSING_INTO, _PASSING_INSIDE = 10, 6
"""Per D and per I of each of the K experts while one layer computes."""
_CHECKPOINT = 4
"""Per D and layer if only the layers' inputs are kept."""
_TRAINED_LOGIT = 18
"""Per logit in training: in the model's dtype and in fp32, softmax, and gradients."""
_SCORES = 12
"""Per value of the stored up projections and outputs: twice in the model's dtype, and in fp64 for pairs."""


@dataclass(frozen=True)
class Lengths:
    """The longest row in tokens.

    Args:
        row: Prompt and response.
        response: Only the response.
        trained: The longest row from its first trained token on; 0 where it is the response.
    """

    row: int
    response: int
    trained: int = 0


class _Experts(NamedTuple):
    """One layer's experts: their number, D and I."""

    number: int
    width: int
    inner: int

    def bytes(self, into: int, inside: int) -> int:
        """Return what one expert takes per token."""
        return into * self.width + inside * self.inner


_known: WeakKeyDictionary[Any, tuple[list[_Experts], int]] = WeakKeyDictionary()
"""What ``_shapes`` has found: a planner asks for it many times."""


def _shapes(model: Any) -> tuple[list[_Experts], int]:
    """Return the shapes of a model's experts, and the bytes that its other MLPs keep per token.

    Shared experts and dense MLPs keep their inputs once, and their outputs twice.
    """
    if model in _known:
        return _known[model]
    experts = []
    for layer in find_experts(model):
        inner = layer.expert(0).down.numel() // layer.width
        experts.append(_Experts(layer.num_experts, layer.width, inner))
    around, head = tuple(f"{name}." for name in attention_modules(model)), model.get_output_embeddings()
    dense = sum(
        2 * (layer.in_features + 2 * layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not name.startswith(around)
    )
    _known[model] = experts, dense
    return experts, dense


@dataclass(frozen=True)
class Activations:
    """A run's activations.

    Args:
        model: The base, on the meta device or loaded, without adapters.
        config: The run.
        lengths: The longest row.
        top_k: ``K``.
    """

    model: Any
    config: RunConfig
    lengths: Lengths
    top_k: int

    def training(self, personal: int) -> int:
        """Return the bytes that the backward pass needs for one micro-batch; DPO's holds two answers of each row.

        Args:
            personal: fp32 bytes of personal experts; whole ones are also kept in the dtype of the products.
        """
        tokens, graft, (experts, dense) = self._trained * self.lengths.row, self.config.graft, _shapes(self.model)
        per_token = self._layers * _LAYER * self._width + dense
        copies = personal // 2 if graft.rank == "full" else 0
        opens_to = graft.opens_to(make_method(self.config.method).opens_to)
        grafted = graft.experts * (2 if opens_to == "difference" else 1)
        for layer in experts:
            per_token += self.top_k * layer.bytes(_INTO, _INSIDE)
            per_token += grafted * layer.bytes(_GRAFT_INTO, _GRAFT_INSIDE) if personal else 0
        kept = self._scale * tokens * per_token + copies
        if self.config.training.gradient_checkpointing:
            kept = tokens * self._layers * _CHECKPOINT * self._width + kept // self._layers
        return kept + self._passing(tokens)

    def evaluation(self) -> int:
        """Return the bytes that generation needs: one computing layer, and all layers' keys and values."""
        evaluation = self.config.evaluation
        longest = chosen_limit(self.lengths.response, self.config.training.max_length)
        return self.reading(evaluation.batch_size * (self.lengths.row + (evaluation.max_new_tokens or longest)))

    def reading(self, tokens: int) -> int:
        """Return the bytes of a cache of so many tokens, and of a layer that reads them all."""
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head = getattr(text, "head_dim", None) or self._width // text.num_attention_heads
        return self._passing(tokens) + 2 * 2 * self._scale * tokens * self._layers * int(heads * head)

    def selection(self, *, on_cpu: bool = True) -> int:
        """Return the bytes that scoring all experts of one layer needs, with the forward pass.

        Without pairs a CPU scores one expert after the other, and a card several at once.
        """
        graft = self.config.graft
        batches = math.ceil(graft.calibration_rows / self._micro_batch)
        tokens = min(self._micro_batch * self.lengths.row, math.ceil(graft.calibration_tokens / batches), TOKENS)
        most = 0
        for experts in _shapes(self.model)[0]:
            several = 1 if on_cpu else min(experts.number, max(1, AT_ONCE // (tokens * 2 * experts.inner)))
            most = max(most, (experts.number if graft.experts > 1 else several) * experts.bytes(1, 2))
        return _SCORES * min(tokens * most, STACK) + self._passing(self._micro_batch * self.lengths.row)

    def logits(self, rows: int, *, trained: bool, on_cpu: bool = True) -> int:
        """Return the bytes of the logits of ``rows`` responses; in training, of one micro-batch.

        Only a CPU has all scored logits at once; a card has those of a few positions, and of one token of each row.
        """
        vocabulary: int = self.model.config.get_text_config().vocab_size
        columns = max(self.lengths.response, self.lengths.trained)
        if trained:
            return _TRAINED_LOGIT * self._trained * (columns + 1) * vocabulary
        whole = LOGIT_BYTES * rows * (columns + 1) * vocabulary
        return whole if on_cpu else min(whole, MOST_BYTES + LOGIT_BYTES * rows * vocabulary)

    @property
    def _micro_batch(self) -> int:
        return self.config.training.rows_per_pass

    @property
    def _trained(self) -> int:
        """Answers in one training pass."""
        return self._micro_batch * (2 if self.config.training.objective == "dpo" else 1)

    @property
    def _scale(self) -> int:
        return 1 if self.config.model.precision == "bf16" else 2

    @property
    def _width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def _layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def _passing(self, tokens: int) -> int:
        """Return the bytes of the largest layer while it computes."""
        most = max(e.bytes(_PASSING_INTO, _PASSING_INSIDE) for e in _shapes(self.model)[0])
        return self._scale * tokens * self.top_k * most


def row_lengths(workspace: Workspace, clients: Mapping[str, ClientRows]) -> Lengths:
    """Return the longest row, response and trained part of a run's clients; a pair counts with both answers."""
    encoded = [
        workspace.encoder_for(name).encode_all((*its.train, *its.test, *its.validation))
        for name, its in clients.items()
    ]
    forms = [form for client in encoded for example in client for form in example.forms]
    lengths = ((len(e.input_ids), e.response_length, e.trained_columns) for e in forms)
    return Lengths(*map(max, zip(*lengths, strict=True)))
