"""FedDPA: every row's weight by the formula, from hidden states by hand, and that it reaches all scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexperts.data.batches import PaddedBatch
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.engines.run import run_federation
from flexperts.errors import FederationError
from flexperts.evaluation.generation import generate, prompt_batch
from flexperts.evaluation.scores import EvaluationSettings, evaluate
from flexperts.methods.feddpa import FedDPAF, InstanceWeights
from flexperts.methods.kit.server_state import Server
from flexperts.methods.kit.turn import Turn
from flexperts.observer import Observer
from flexperts.parameters.vector import Payload
from flexperts.seeding import generator
from flexperts.testing import byte_tokenizer

from .conftest import SETTINGS

ROWS = [
    Row("Name the colour of the sky.", "", "blue"),
    Row("Add.", "one and two", "three, I should say"),
    Row("Say yes.", "", "yes"),
]
OPTIONS = "method.options={lam=0.7, instances=3}"


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(byte_tokenizer(), max_length=640)


@contextmanager
def personalized(take_turn: Any, *overrides: str) -> Iterator[tuple[Turn, InstanceWeights]]:
    with (
        take_turn("method.name=feddpa_t", *(overrides or (OPTIONS,))) as (method, turn),
        method.in_state(turn, "personalized") as weights,
    ):
        yield turn, weights


def batch_of(encoder: PromptEncoder) -> PaddedBatch:
    return prompt_batch([encoder.encode(row).prompt for row in ROWS], encoder)


def last_hidden(model: Any, prompt: Sequence[int]) -> Tensor:
    """The last token's last hidden state, of one unpadded prompt."""
    with torch.no_grad():
        return model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1].double()


def alphas(turn: Turn, merged: Callable[..., Any], encoder: PromptEncoder, lam: float, count: int) -> list[float]:
    """lam mean_s cos(h(x), h(x_s)) in float64, h from a plain model with l merged into its weights."""
    local = merged((1.0, turn.split.personal))
    examples = turn.site.examples
    drawn = torch.randperm(len(examples), generator=generator(0, "clinic", "instances"))[:count]
    own = [last_hidden(local, examples[i].input_ids[: examples[i].prompt_length]) for i in drawn]
    values = []
    for row in ROWS:
        h = last_hidden(local, encoder.encode(row).prompt)
        values.append(lam * sum(float(h @ s / (h.norm() * s.norm())) for s in own) / len(own))
    return values


def by_row(turn: Turn, merged: Callable[..., Any], weights: Sequence[float]) -> list[Any]:
    """One plain model per row: W0 + (1 - alpha) dW_g + alpha dW_l."""
    return [merged((1 - a, turn.split.shared), (a, turn.split.personal)) for a in weights]


def test_alpha_is_the_formula_for_rows_of_different_lengths(
    take_turn: Any, merged: Callable[..., Any], encoder: PromptEncoder
) -> None:
    with personalized(take_turn) as (turn, weights):
        expected = alphas(turn, merged, encoder, 0.7, 3)
        assert torch.allclose(weights.alpha(batch_of(encoder)), torch.tensor(expected), atol=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_a_second_batch_is_weighted_as_if_it_were_the_first(take_turn: Any, encoder: PromptEncoder) -> None:
    one = prompt_batch([encoder.encode(ROWS[1]).prompt], encoder)
    with personalized(take_turn) as (turn, weights), torch.no_grad():
        weights(one)
        alone = turn.model(input_ids=one.input_ids).logits
        weights(batch_of(encoder))
        weights(one)
        assert torch.equal(turn.model(input_ids=one.input_ids).logits, alone)


def test_defaults_are_half_and_five(take_turn: Any, merged: Callable[..., Any], encoder: PromptEncoder) -> None:
    with personalized(take_turn, "seed=0") as (turn, weights):
        expected = alphas(turn, merged, encoder, 0.5, 5)
        assert torch.allclose(weights.alpha(batch_of(encoder)), torch.tensor(expected), atol=1e-5)


def test_a_negative_likeness_is_not_clamped(take_turn: Any, encoder: PromptEncoder) -> None:
    with personalized(take_turn) as (_, weights):
        before = weights.alpha(batch_of(encoder))
        weights.own = -weights.own
        assert torch.equal(weights.alpha(batch_of(encoder)), -before)


def test_logits_of_every_row_are_those_of_its_own_merged_weights(
    take_turn: Any, merged: Callable[..., Any], encoder: PromptEncoder
) -> None:
    batch = batch_of(encoder)
    with personalized(take_turn) as (turn, weights), torch.no_grad():
        weights(batch)
        ours = turn.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1]
        models = by_row(turn, merged, alphas(turn, merged, encoder, 0.7, 3))
        for row, (model, logits) in enumerate(zip(models, ours, strict=True)):
            plain = model(torch.tensor([encoder.encode(ROWS[row]).prompt])).logits[0, -1]
            assert torch.allclose(logits, plain, atol=2e-4), row
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_nll_and_answers_are_those_of_merged_weights(
    take_turn: Any, merged: Callable[..., Any], encoder: PromptEncoder
) -> None:
    with personalized(take_turn) as (turn, weights):
        settings = EvaluationSettings(4, 3, "fp32")
        scores = evaluate(turn.model, encoder, ROWS, settings, on_batch=weights)
        models = by_row(turn, merged, alphas(turn, merged, encoder, 0.7, 3))
    nll, tokens = 0.0, 0
    for model, row, answer in zip(models, ROWS, scores.predictions, strict=True):
        example = encoder.encode(row)
        with torch.no_grad():
            logp = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        places = range(example.prompt_length, len(example.input_ids))
        nll, tokens = nll - sum(float(logp[p - 1, example.input_ids[p]]) for p in places), tokens + len(places)
        assert answer == greedy(model, encoder, list(example.prompt), 4)
    assert sum(scores.tokens) == tokens
    assert scores.nll == pytest.approx(nll / tokens, abs=1e-4)


def greedy(model: Any, encoder: PromptEncoder, ids: list[int], count: int) -> str:
    """The most likely tokens one by one, without a cache."""
    return str(
        encoder.tokenizer.decode(greedy_tokens(model, encoder, ids, count), skip_special_tokens=True)
    ).strip()


def greedy_tokens(model: Any, encoder: PromptEncoder, ids: list[int], count: int) -> list[int]:
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != encoder.tokenizer.eos_token_id):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("way", ["evaluate", "generate"])
def test_rows_keep_their_weights_when_others_have_ended(
    take_turn: Any, merged: Callable[..., Any], encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A token that only some rows write ends their answers: the others go on, each with its own weights."""
    prompts = [list(encoder.encode(row).prompt) for row in ROWS]
    with personalized(take_turn) as (turn, weights):
        models = by_row(turn, merged, alphas(turn, merged, encoder, 0.7, 3))
        free = [greedy_tokens(m, encoder, p, 12) for m, p in zip(models, prompts, strict=True)]
        end = next(t for tokens in free for t in tokens if any(t not in others for others in free))
        alone = [[*takewhile(lambda t: t != end, tokens), *([end] if end in tokens else [])] for tokens in free]
        assert len({len(tokens) for tokens in alone}) > 1
        monkeypatch.setattr("flexperts.evaluation.generation.end_tokens", lambda *_: [end])
        if way == "evaluate":
            settings = EvaluationSettings(12, 3, "fp32")
            answers: Sequence[str] = evaluate(turn.model, encoder, ROWS, settings, on_batch=weights).predictions
        else:
            settled = {"max_new_tokens": 12, "batch_size": 3, "precision": "fp32", "on_batch": weights}
            answers = generate(turn.model, encoder, prompts, **settled)
    said = [[token for token in tokens if token != end] for tokens in alone]  # what ends an answer is no part of it
    decode = encoder.tokenizer.batch_decode(said, skip_special_tokens=True)
    assert list(answers) == [text.strip() for text in decode]


def test_another_lambda_is_another_model_and_0_is_the_global_one(take_turn: Any, encoder: PromptEncoder) -> None:
    batch, seen = batch_of(encoder), []
    for lam in (0.0, 0.5, 0.8):
        with personalized(take_turn, f"method.options={{lam={lam}}}") as (turn, weights), torch.no_grad():
            weights(batch)
            seen.append(turn.model(input_ids=batch.input_ids).logits)
    with take_turn("method.name=feddpa_t") as (method, turn), method.in_state(turn, "global"), torch.no_grad():
        common = turn.model(input_ids=batch.input_ids).logits
    assert torch.allclose(seen[0], common, atol=1e-6)
    assert (seen[1] - common).abs().max() > 1e-3
    assert (seen[2] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["feddpa_t", "feddpa_f"])
def test_an_untrained_l_takes_no_weight_from_g(name: str, take_turn: Any, encoder: PromptEncoder) -> None:
    batch, scored = batch_of(encoder), {}
    with take_turn(f"method.name={name}") as (method, turn), torch.no_grad():
        for parameter_name, parameter in turn.split.personal.items():
            if ".lora_B." in parameter_name:
                parameter.zero_()
        for state in ("global", "personalized"):
            with method.in_state(turn, state) as weigh:
                if weigh is not None:
                    weigh(batch)
                scored[state] = turn.site.lora.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(scored["personalized"], scored["global"])


def test_nothing_is_left_behind(take_turn: Any, encoder: PromptEncoder) -> None:
    batch = batch_of(encoder)
    with take_turn("method.name=feddpa_t") as (method, turn), torch.no_grad():
        before = turn.model(input_ids=batch.input_ids).logits
        for error in (None, RuntimeError("broken")):
            try:
                with method.in_state(turn, "personalized") as weights:
                    weights(batch)
                    weights(batch)
                    if error:
                        raise error
            except RuntimeError:
                pass
            assert torch.equal(turn.model(input_ids=batch.input_ids).logits, before)
            assert not any(m._forward_hooks for m in turn.site.lora.base.modules())
        assert all(p.requires_grad for p in turn.split.trained.values())


# Training.


def test_l_trains_in_a_mixture_with_a_fixed_g(take_turn: Any, merged: Callable[..., Any]) -> None:
    """The first loss of round 2 is that of W0 + 0.3 dW_l + 0.7 dW_g; then g trains alone."""
    losses: list[float] = []
    rows: list[Any] = []
    with take_turn(
        "method.name=feddpa_t", "method.options={mix=0.3}", round=2, on_step=lambda loss, _: losses.append(loss)
    ) as (m, turn):
        m.receive(turn)
        local = {n: p.detach().clone() for n, p in turn.split.personal.items()}
        objective = turn.objective
        turn = replace(turn, objective=lambda *a: rows.append(a[1]) or objective(*a))
        result = m.train(turn)
        mixture = merged((0.3, local), (0.7, turn.received))
        alone = merged((1.0, turn.received))
        with torch.no_grad():
            first = sum(p.item() for p in objective(mixture, rows[0], turn.settings))
            third = sum(p.item() for p in objective(alone, rows[2], turn.settings))
    assert result.steps == len(losses) == 4
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert losses[2] == pytest.approx(third, abs=1e-4)  # g has not moved while l trained, and l does not count


def phases(take_turn: Any, moves: Any, name: str, number: int, *settings: str) -> list[set[str]]:
    seen: list[set[str]] = []
    holder: list[Turn] = []
    step = moves(seen, lambda: holder[0])
    with take_turn(f"method.name={name}", *settings, round=number, on_step=step) as (method, turn):
        holder.append(turn)
        step(0.0, 0)
        seen.clear()
        method.train(turn)
    return seen


def test_which_adapter_moves_when(take_turn: Any, moves: Any) -> None:
    """Two steps a round and two rounds: F's local phase takes four, or two at participation 0.5."""
    assert phases(take_turn, moves, "feddpa_t", 1) == [{"shared"}] * 2
    assert phases(take_turn, moves, "feddpa_t", 2) == [{"personal"}] * 2 + [{"shared"}] * 2
    assert phases(take_turn, moves, "feddpa_f", 2) == [{"shared"}] * 2
    assert phases(take_turn, moves, "feddpa_f", 3) == [{"personal"}] * 4
    assert phases(take_turn, moves, "feddpa_f", 3, "federation.participation=0.5") == [{"personal"}] * 2


def test_the_local_phase_warms_up_over_its_own_steps(take_turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(FedDPAF, "personalize", lambda _, turn, settings: seen.append(settings))
    training = SETTINGS.training.model_copy(update={"warmup_ratio": 0.5})
    given = replace(SETTINGS, training=training, warmup_steps=2, total_steps=4)  # of two rounds
    options = ("method.name=feddpa_f", "federation.participation=0.5")
    with take_turn(*options, round=3, settings=given) as (method, turn):
        method.train(turn)
    [settings] = seen
    assert (settings.steps, settings.total_steps, settings.warmup_steps) == (2, 2, 1)


def test_an_untrained_l_starts_at_a_draw_of_the_clients_own(take_turn: Any) -> None:
    with take_turn("method.name=feddpa_t", disturbed=False) as (method, turn):
        method.receive(turn)
        first = {n: p.detach().clone() for n, p in turn.split.personal.items()}
        method.receive(turn)
        for name, parameter in turn.split.personal.items():
            assert torch.equal(parameter, first[name])
            if ".lora_A." in name:
                assert 0.9 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1
                assert not torch.equal(parameter, turn.received[name.removeprefix("personal.")])
            else:
                assert not parameter.any()


# The extra round.


def test_the_extra_round_of_f_on_the_server() -> None:
    method = FedDPAF()
    server = Server(Payload.of({"base_model.x": torch.ones(2)}), {"a": 1, "b": 1}, agreement=2, round=1)
    assert method.extra_rounds(2) == 1
    assert method.participants(server, ["b"]) == ["b"]
    assert method.uplink(server, "a") == server.shared.manifest
    server.round = 2
    assert method.participants(server, ["b"]) == ["a", "b"]
    assert method.uplink(server, "a").size == 0
    replies = iter(["never looked at"])
    before = server.shared.vector.copy()
    method.aggregate(server, replies)
    assert next(replies, None) is None
    assert (server.shared.vector == before).all()
    with pytest.raises(FederationError, match="one recipe"):
        method.agree({"a": 2, "b": 3})


def test_a_run_of_f_is_fedavg_and_one_silent_round(recipe: Any, tmp_path: Path) -> None:
    settings = ("federation.participation=0.5", "training.lr=0.02", "evaluation.max_new_tokens=2")
    summary = run_federation(recipe("method.name=feddpa_f", *settings), tmp_path / "f")
    run_federation(recipe("method.name=fedavg", *settings), tmp_path / "fedavg")
    adapters = [(tmp_path / m / "shared" / "adapter_model.safetensors").read_bytes() for m in ("f", "fedavg")]
    assert adapters[0] == adapters[1]
    rounds = [json.loads(line) for line in (tmp_path / "f" / "rounds.jsonl").read_text().splitlines()]
    assert [len(r["clients"]) for r in rounds] == [2, 2, 4]
    assert set(rounds[2]["declared"]["uplink"].values()) == {0}
    assert [r["clients"]["shop"]["steps"] for r in rounds[2:]] == [2]  # one round of two is its share
    assert summary["mean"]["nll"]["personalized"] != summary["mean"]["nll"]["global"]


class Notices(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_kept_moments_have_no_effect_on_f_and_it_says_so(recipe: Any, tmp_path: Path) -> None:
    said, scores = {}, {}
    for moments in ("fresh", "kept"):
        seen = Notices()
        config = recipe(
            "method.name=feddpa_f", f"training.personal_moments={moments}", "evaluation.max_new_tokens=1"
        )
        scores[moments] = run_federation(config, tmp_path / moments, seen)["clients"]
        said[moments] = [text for text in seen.texts if "personal_moments" in text]
    assert scores["fresh"] == scores["kept"]
    assert said["fresh"] == []
    (text,) = said["kept"]
    assert "has no effect: feddpa_f trains" in text


def test_a_run_of_t_with_one_local_step_sends_no_personal_byte(recipe: Any, tmp_path: Path) -> None:
    config = recipe("method.name=feddpa_t", "training.local_steps=1", "evaluation.max_new_tokens=1")
    assert run_federation(config, tmp_path / "run")["bytes"]["personal_sent"] == 0
