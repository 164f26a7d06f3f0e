"""A client's record of its routing: one line for every evaluated round and model state.

A line is ``{"round", "state", "layers": {experts module: numbers}}``. The numbers are those of
``summarize_routing`` and, for a state with a graft, the opening of its gate: "opening" [k] and "opening_std" [k]
(over tokens) of the personal graft, "common_opening" and "common_opening_std" of the graft that clients share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from flexperts.data.batches import PaddedBatch
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import prompt_batch
from flexperts.files import damaged, json_text, read_lines, write_text
from flexperts.methods.kit.method import Method, State
from flexperts.methods.kit.turn import Turn
from flexperts.modeling.forward import Precision
from flexperts.modeling.recording import record
from flexperts.modeling.routing import LayerRouting, routing_recorders, summarize_routing
from flexperts.moe.experts import find_experts
from flexperts.parts.grafts import Grafts, OpeningRecorder

Layers = dict[str, dict[str, Any]]


def prompt_batches(encoder: PromptEncoder, rows: Sequence[Row], batch_size: int) -> list[PaddedBatch]:
    """Return the rows' prompts in batches, sorted by length."""
    prompts = sorted((encoder.encode(row).prompt for row in rows), key=len)
    return [prompt_batch(prompts[i : i + batch_size], encoder) for i in range(0, len(prompts), batch_size)]


def routing_lines(
    turn: Turn,
    method: Method,
    states: Sequence[State],
    batches: Sequence[PaddedBatch],
    known: MutableMapping[tuple[Precision, str], dict[str, LayerRouting]],
) -> list[dict[str, Any]]:
    """Describe the routing of model states, each against the untouched base on the same tokens.

    Args:
        turn: The client's turn, after ``method.receive``.
        method: Sets the states up.
        states: Which of zero_shot, global, personalized.
        batches: The prompts to route; ``on_batch`` of a state receives each batch.
        known: A cache of the untouched base's routing.
    """
    key = turn.site.config.model.precision, _digest(batches)
    if key not in known:
        known[key], _ = _observe(turn, method, "zero_shot", batches)
    base, lines = known[key], []
    for state in states:
        now, openings = (base, {}) if state == "zero_shot" else _observe(turn, method, state, batches)
        layers = {n: summarize_routing(r, base[n]) | openings.get(n, {}) for n, r in now.items()}
        lines.append({"round": turn.round, "state": state, "layers": layers})
    return lines


def write_routing(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add a round's lines to a client's file.

    Older lines of that round or of later rounds are removed: a resumed run writes them again.
    """
    first = min(line["round"] for line in lines)
    old = read_lines(path) if path.exists() else []
    try:
        kept = [line for line in old if line["round"] < first]
    except (KeyError, TypeError) as error:
        raise damaged(path, f"a line has no round ({error!r})") from error
    write_text(path, "".join(f"{json_text(line)}\n" for line in [*kept, *lines]))


def _observe(
    turn: Turn, method: Method, state: State, batches: Sequence[PaddedBatch]
) -> tuple[dict[str, LayerRouting], Layers]:
    """Return a state's routing and gate openings by experts module, from one pass over the batches."""
    model = turn.site.lora.base
    routing = routing_recorders(model, find_experts(model))
    gates = {name: OpeningRecorder(part) for name, part in turn.parts.items() if isinstance(part, Grafts)}
    precision = turn.site.config.model.precision
    with method.in_state(turn, state) as on_batch:
        record(model, [*routing.values(), *gates.values()], batches, precision, on_batch)
    return {name: recorder.result() for name, recorder in routing.items()}, _openings(gates)


def _openings(gates: Mapping[str, OpeningRecorder]) -> Layers:
    """Return the openings of all gates by experts module, with names made from the part's."""
    openings: Layers = {}
    for part, recorder in gates.items():
        name = f"{part.removesuffix('graft')}opening"
        for layer, (mean, std) in recorder.result().items():
            openings.setdefault(layer, {}).update({name: _short(mean), f"{name}_std": _short(std)})
    return openings


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _digest(batches: Sequence[PaddedBatch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.attention_mask):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
