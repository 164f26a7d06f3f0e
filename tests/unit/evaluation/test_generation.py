"""Generation: greedy whatever the base's own habits, the same in a batch as alone, in the order asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.generation import generate
from flexperts.evaluation.scores import EvaluationSettings, evaluate, rouge_l
from flexperts.modeling.forward import next_logits
from flexperts.testing import byte_tokenizer, tiny_model

QUESTIONS = ["Hi", "What is this note about?", "x" * 60, "Sum up", "Why?", "A note on the till and the shelf"]
LENGTH = 12


@pytest.fixture
def model() -> Any:
    return tiny_model(seed=0)


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(byte_tokenizer())


@pytest.fixture
def prompts() -> list[list[int]]:
    """Of several lengths, two with one last token, so that answers depend on more than that."""
    stream = torch.Generator().manual_seed(1)
    made = [torch.randint(256, (length,), generator=stream).tolist() for length in (5, 30, 2, 17, 1, 30)]
    made[5][-1] = made[1][-1]
    return made


def answers(model: Any, encoder: PromptEncoder, prompts: list[list[int]], batch_size: int = 4) -> list[str]:
    return generate(model, encoder, prompts, max_new_tokens=LENGTH, batch_size=batch_size, precision="fp32")


@torch.no_grad()
def argmax_tokens(model: Any, prompt: list[int], stops: set[int]) -> list[int]:
    """The definition of greedy: the whole prefix again for every token, no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + LENGTH and not (len(ids) > len(prompt) and ids[-1] in stops):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def text(encoder: PromptEncoder, tokens: list[int]) -> str:
    return encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_greedy_is_the_argmax_loop(model: Any, encoder: PromptEncoder, prompts: list[list[int]]) -> None:
    expected = [text(encoder, argmax_tokens(model, prompt, {257})) for prompt in prompts]
    assert len(set(expected)) == len(prompts)
    assert answers(model, encoder, prompts) == expected


@pytest.mark.parametrize("batch_size", [2, 5, 6, 100])
def test_a_batch_answers_as_one_by_one_and_in_order(
    model: Any, encoder: PromptEncoder, prompts: list[list[int]], batch_size: int
) -> None:
    one_by_one = [answers(model, encoder, [prompt])[0] for prompt in prompts]
    assert answers(model, encoder, prompts, batch_size) == one_by_one
    assert answers(model, encoder, prompts[::-1], batch_size) == one_by_one[::-1]


@pytest.mark.parametrize("told_by", ["tokenizer", "model", "list"])
def test_it_stops_at_the_end_of_sequence(
    model: Any, encoder: PromptEncoder, prompts: list[list[int]], told_by: str
) -> None:
    """Some bases end a turn with a token that only their generation config names."""
    free = argmax_tokens(model, prompts[0], set())
    end = free[4]
    kept = free[: free.index(end) + 1]
    assert 2 < len(kept) < len(free)
    if told_by == "tokenizer":
        encoder.tokenizer.eos_token = encoder.tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = end if told_by == "model" else [258, end]
    assert answers(model, encoder, prompts)[0] == text(encoder, kept[:-1])  # what ends an answer is no part of it


def test_special_tokens_are_no_part_of_an_answer(
    model: Any, encoder: PromptEncoder, prompts: list[list[int]]
) -> None:
    free = argmax_tokens(model, prompts[0], set())
    with torch.no_grad():  # now the model says EOS in place of its fifth token
        model.lm_head.weight[[257, free[4]]] = model.lm_head.weight[[free[4], 257]]
    kept = free[: free.index(free[4])]
    assert len(kept) >= 2
    assert answers(model, encoder, prompts)[0] == encoder.tokenizer.decode(kept).strip()


def test_habits_of_the_base_do_not_reach_greedy_answers(
    model: Any, encoder: PromptEncoder, prompts: list[list[int]]
) -> None:
    """generate() fills what is unset from the base's generation_config.json; Qwen's has a repetition penalty."""
    expected = answers(model, encoder, prompts)
    for name, value in {
        "repetition_penalty": 5.0,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 9.0,
        "top_k": 3,
        "max_length": 1,
        "max_new_tokens": 1,
    }.items():
        setattr(model.generation_config, name, value)
    assert answers(model, encoder, prompts) == expected


@pytest.mark.parametrize(
    ("family", "leave"), [("qwen2_moe", True), ("qwen3_next", True), ("deepseek_v32", False)], ids=lambda v: str(v)
)
def test_rows_that_have_ended_leave_the_batch_where_caches_allow_it(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, family: str, leave: bool
) -> None:
    model = tiny_model(family)
    stream = torch.Generator().manual_seed(1)  # of one length: padding changes what indexers choose
    asked = [torch.randint(256, (9,), generator=stream).tolist() for _ in range(4)]
    free = [argmax_tokens(model, prompt, {257}) for prompt in asked]
    end = next(t for t in free[0][2:6] if t not in free[0][:2] and any(t not in other for other in free))
    model.generation_config.eos_token_id = end
    expected = [argmax_tokens(model, prompt, {257, end}) for prompt in asked]
    assert len({len(tokens) for tokens in expected}) > 1

    fed: list[int] = []

    def watched(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        fed.append(len(ids))
        return next_logits(model, ids, *rest)

    monkeypatch.setattr("flexperts.evaluation.generation.next_logits", watched)
    said = [tokens[:-1] if tokens[-1] == end else tokens for tokens in expected]
    assert answers(model, encoder, asked) == [text(encoder, tokens) for tokens in said]
    steps = [sum(len(tokens) > n for tokens in expected) for n in range(1, max(map(len, expected)))]
    assert fed == (steps if leave else [4] * len(steps))


def test_no_prompts_no_answers(model: Any, encoder: PromptEncoder) -> None:
    assert answers(model, encoder, []) == []


def test_evaluation_scores_the_generated_answers_and_the_responses(model: Any, encoder: PromptEncoder) -> None:
    rows = [
        Row(question, response) for question, response in zip(QUESTIONS, ["Yes", "No, é", "a b c"] * 2, strict=True)
    ]
    scores = evaluate(model, encoder, rows, EvaluationSettings(LENGTH, 4, "fp32"))
    assert list(scores.predictions) == answers(model, encoder, [encoder.prompt(q) for q in QUESTIONS])
    points = rouge_l(scores.predictions, [row.response for row in rows])
    assert scores.rouge_l == pytest.approx(sum(points) / 6)
    total, tokens = 0.0, 0
    for row in rows:
        example = encoder.encode(row)
        response = list(example.input_ids[example.prompt_length :])
        ids = torch.tensor([[*encoder.prompt(row.instruction), *response]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = range(ids.shape[1] - len(response), ids.shape[1])
        total -= sum(float(logs[p - 1, ids[0, p]]) for p in places)
        tokens += len(response)
    assert scores.nll == pytest.approx(total / tokens, rel=1e-5)
    assert scores.rows == 6


def test_an_answer_tells_how_it_ended(model: Any, encoder: PromptEncoder, prompts: list[list[int]]) -> None:
    free = argmax_tokens(model, prompts[0], set())
    model.generation_config.eos_token_id = free[4]
    found = answers(model, encoder, prompts)
    kept = [argmax_tokens(model, prompt, {257, free[4]}) for prompt in prompts]
    assert [a.tokens for a in found] == [len(tokens) for tokens in kept]
    assert [a.cut for a in found] == [tokens[-1] not in {257, free[4]} for tokens in kept]
    assert (found[0].cut, found[0].tokens) == (False, free.index(free[4]) + 1)
    assert any(a.cut for a in found)
    assert all(a.finite for a in found)


def test_an_end_at_the_limit_is_no_cut(model: Any, encoder: PromptEncoder, prompts: list[list[int]]) -> None:
    free = argmax_tokens(model, prompts[0], set())
    model.generation_config.eos_token_id = free[4]
    length = free.index(free[4]) + 1
    for limit, cut in ((length - 1, True), (length, False), (length + 1, False)):
        settings = {"max_new_tokens": limit, "batch_size": 1, "precision": "fp32"}
        assert generate(model, encoder, prompts[:1], **settings)[0].cut is cut


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("announced", [False, True])
def test_an_answer_ends_where_the_logits_are_no_numbers(
    model: Any, encoder: PromptEncoder, prompts: list[list[int]], value: float, announced: bool
) -> None:
    """As one expert's NaN shows: only once a token is routed to it, and the other rows go on."""
    usual = answers(model, encoder, prompts)
    tokens = [argmax_tokens(model, prompt, {257}) for prompt in prompts]
    victim, place = next(
        (row, place)
        for row, mine in enumerate(tokens)
        for place, token in enumerate(mine[:-1])
        if place > 0
        and all(
            token not in [*prompt, *other]
            for prompt, other in zip(prompts, tokens, strict=True)
            if other is not mine
        )
        and token not in prompts[row]
        and token not in mine[:place]
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens[victim][place]] = value
    settings: dict[str, Any] = {"max_new_tokens": LENGTH, "batch_size": 4, "precision": "fp32"}
    found = generate(model, encoder, prompts, **settings, on_batch=(lambda batch: None) if announced else None)
    assert [a.finite for a in found] == [row != victim for row in range(len(prompts))]
    assert found[victim] == text(encoder, tokens[victim][: place + 1])
    assert not found[victim].cut
    assert [a for row, a in enumerate(found) if row != victim] == [
        a for row, a in enumerate(usual) if row != victim
    ]
