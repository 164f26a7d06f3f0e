"""What a client writes of its routing: states against the untouched base, gates by part, and the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexperts.client.model import ClientModel
from flexperts.client.routing_log import prompt_batches, routing_lines, write_routing
from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.data.batches import PaddedBatch
from flexperts.errors import ModelError
from flexperts.methods.kit.method import Method
from flexperts.methods.kit.turn import Turn
from flexperts.methods.registry import make_method
from flexperts.modeling.load import load_base
from flexperts.modeling.routing import record_routing, summarize_routing
from flexperts.moe.experts import find_experts
from flexperts.testing import VOCABULARY, byte_tokenizer

Recipe = Callable[..., RunConfig]
CLIENT = "clinic"


@contextmanager
def turn_of(config: RunConfig) -> Iterator[tuple[Method, Turn, list[PaddedBatch]]]:
    """Lend the tiny base to one client, with values in everything that trains."""
    workspace, method = Workspace(config), make_method(config.method)
    model = ClientModel(workspace.base, config, method)
    site = model.site(CLIENT, workspace.examples(CLIENT))
    site = replace(site, prepared=method.prepare(site))
    stream = torch.Generator().manual_seed(11)
    batches = prompt_batches(workspace.encoder, workspace.clients[CLIENT].test, 3)
    with model.lend(site, {}) as (split, parts):
        with torch.no_grad():
            for parameter in split.trained.values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream))
        received = {n: p.detach().clone() for n, p in split.shared.items()}
        settings: Any = None
        yield method, Turn(site, 2, split, parts, received, {}, settings, stream), batches
    model.close()


def test_prompts_are_batched_by_length(recipe: Recipe) -> None:
    workspace = Workspace(recipe())
    rows = workspace.clients[CLIENT].test
    batches = prompt_batches(workspace.encoder, rows, 3)
    lengths = [n for b in batches for n in b.attention_mask.sum(1).tolist()]
    assert [len(b.input_ids) for b in batches] == [3, 1]
    assert lengths == sorted(len(workspace.encoder.prompt(r.instruction, r.context)) for r in rows)


@pytest.mark.parametrize(
    ("settings", "openings"),
    [
        (("method.name=fedavg",), {"global": set()}),
        (("method.name=fedmoe_style",), {"global": set(), "personalized": set()}),
        (("method.name=flex", "graft.experts=2"), {"global": set(), "personalized": {"opening"}}),
        (("method.name=flex", "graft.place=in_place"), {"global": set(), "personalized": set()}),
        (
            ("method.name=flex", "graft.sharing=shared"),
            {"global": {"common_opening"}, "personalized": {"common_opening"}},
        ),
        (
            ("method.name=flex", "graft.sharing=both"),
            {"global": {"common_opening"}, "personalized": {"opening", "common_opening"}},
        ),
    ],
)
def test_every_state_is_described_against_the_untouched_base(
    recipe: Recipe, settings: tuple[str, ...], openings: dict[str, set[str]]
) -> None:
    config = recipe(*settings)
    plain = load_base(config.model).model
    with turn_of(config) as (method, turn, batches):
        known: dict[str, Any] = {}
        lines = routing_lines(turn, method, method.states, batches, known)
        expected = record_routing(plain, find_experts(plain), batches, "fp32")
        alone = [line for s in reversed(method.states) for line in routing_lines(turn, method, [s], batches, {})]
    assert alone[::-1] == lines
    assert [(line["round"], line["state"]) for line in lines] == [(2, state) for state in method.states]
    assert lines[0]["layers"] == {n: summarize_routing(r, r) for n, r in expected.items()}
    for line in lines[1:]:
        assert list(line["layers"]) == list(expected)
        assert all(layer["divergence"] > 0 for layer in line["layers"].values())
        for layer in line["layers"].values():
            gates = openings.get(line["state"], set())
            assert {k.removesuffix("_std") for k in layer if "opening" in k} == gates
            for gate in gates:
                assert len(layer[gate]) == len(layer[f"{gate}_std"]) == config.graft.experts
                assert all(0 < value < 1 for value in layer[gate])
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines


def test_the_base_is_run_once_for_the_same_prompts(recipe: Recipe) -> None:
    known: dict[str, Any] = {}
    for method_name in ("fedavg", "flex"):
        with turn_of(recipe(f"method.name={method_name}")) as (method, turn, batches):
            passes: list[int] = []
            first = find_experts(turn.site.lora.base)[0].module
            handle = first.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            routing_lines(turn, method, ["zero_shot", "global"], batches, known)
            handle.remove()
            assert len(passes) == len(batches) * (2 if method_name == "fedavg" else 1)
            other = batches[:1]
            routing_lines(turn, method, ["zero_shot"], other, known)
    assert len(known) == 2


def test_weights_of_every_row_are_set_before_its_batch(recipe: Recipe) -> None:
    """FedDPA runs each batch on its own first; that pass is not routing of the state."""
    with turn_of(recipe("method.name=feddpa_f")) as (method, turn, batches):
        turn.settings = SimpleNamespace(precision="fp32")  # type: ignore[assignment]
        lines = routing_lines(turn, method, ["personalized"], batches, {})
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    assert all(layer["tokens"] == tokens for layer in lines[0]["layers"].values())


def test_a_dense_base_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=258, max_position_embeddings=1024, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    dense = recipe("method.name=fedavg", f"model.base={folder}")
    with turn_of(dense) as (method, turn, batches), pytest.raises(ModelError, match="has no experts modules"):
        routing_lines(turn, method, ["global"], batches, {})


def test_a_round_that_is_repeated_takes_the_place_of_what_came_after_the_break(tmp_path: Path) -> None:
    path = tmp_path / "routing" / "clinic.jsonl"
    for number, state in ((1, "global"), (2, "old"), (3, "old"), (2, "global")):
        write_routing(path, [{"round": number, "state": state, "layers": {}}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["round"], line["state"]) for line in lines] == [(1, "global"), (2, "global")]
    write_routing(path, [{"round": 4, "state": s, "layers": {}} for s in ("global", "personalized")])
    assert len(path.read_text().splitlines()) == 4
