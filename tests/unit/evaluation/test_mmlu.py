"""MMLU through lm-eval: scores against plain passes and lm-eval's own model class, prompts, draws, refusals."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from tokenizers import processors

from flexperts.errors import ConfigError, DataError, ModelError
from flexperts.evaluation import harness
from flexperts.evaluation.mmlu import check_source, draw, mmlu
from flexperts.modeling import chunked_losses
from flexperts.testing import byte_tokenizer, tiny_model

SIZES = {"anatomy": 4, "us_history": 6}


def question(subject: str, number: int, answer: int) -> dict:
    choices = [f"{letter}{number}" for letter in "wxyz"]
    return {"subject": subject, "question": f" Q{number}? ", "choices": choices, "answer": answer}


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "dev.jsonl", [question(s, 100 + n, n) for s in SIZES for n in range(2)])
    write(
        tmp_path / "test.jsonl", [question(s, n, (n * 7 + 1) % 4) for s, size in SIZES.items() for n in range(size)]
    )
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ask(model, tokenizer, source, **changes):
    settings = {"questions": None, "shots": 0, "batch_size": 3, "precision": "fp32", "seed": 0} | changes
    return mmlu(model, tokenizer, str(source), **settings)


def prompt(row: dict, examples: list[dict]) -> str:
    """The text that MMLU's authors ask, written out by hand."""
    text = "The following are multiple choice questions (with answers) about "
    text += {"anatomy": "anatomy", "us_history": "us history"}[row["subject"]] + ".\n\n"
    for one in [*examples, row]:
        text += one["question"].strip() + "\n"
        for letter, choice in zip("ABCD", one["choices"], strict=True):
            text += f"{letter}. {choice}\n"
        text += "Answer:" + ("" if one is row else f" {'ABCD'[one['answer']]}\n\n")
    return text


def likelihood(model, tokenizer, context: str, answer: str) -> float:
    tokens, length = tokenizer(context + answer)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(scores[place - 1, tokens[place]].item() for place in range(length, len(tokens)))


def by_hand(model, tokenizer, folder, shots: int) -> dict[str, list[bool]]:
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    dev = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    right = {subject: [] for subject in SIZES}
    for row in rows:
        examples = [d for d in dev if d["subject"] == row["subject"]][:shots]
        values = [likelihood(model, tokenizer, prompt(row, examples), f" {letter}") for letter in "ABCD"]
        right[row["subject"]].append(values.index(max(values)) == row["answer"])
    return right


@pytest.mark.parametrize("shots", [0, 1])
def test_the_score_is_the_one_from_plain_forward_passes(model, tokenizer, folder, shots):
    right = by_hand(model, tokenizer, folder, shots)
    answers = right["anatomy"] + right["us_history"]
    assert 0 < sum(answers) < 10  # otherwise the model would not tell a wrong scorer
    result = ask(model, tokenizer, folder, shots=shots)
    assert result.questions == 10
    assert result.accuracy == sum(answers) / 10
    assert result.stderr == pytest.approx(mean_stderr(answers))
    assert result.by_subject == {subject: sum(r) / len(r) for subject, r in right.items()}


def test_likelihoods_are_those_of_lm_evals_own_model_class(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    pairs = [("Once upon", " A"), ("Once upon", " B"), ("a", " time "), ("no", "x"), ("a b ", "c"), ("", "later")]
    pairs.append(("long " * 100, "end"))
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    ours = harness.LiveModel(model, tokenizer, harness.Forward(2, "fp32")).loglikelihood(requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (our, _), (their, _) in zip(ours[:-1], theirs[:-1], strict=True):
        assert our == pytest.approx(their, abs=1e-4)
    assert ours[-1][0] == pytest.approx(theirs[-1][0], abs=0.5)  # cut to fit, one token shorter than theirs


def test_a_greedy_continuation_is_told(model, tokenizer):
    with torch.no_grad():
        ids = torch.tensor([tokenizer("abc")["input_ids"]])
        best = model(input_ids=ids).logits[0, -1].argmax().item()
    live = harness.LiveModel(model, tokenizer, harness.Forward(4, "fp32"))
    found = live._loglikelihood_tokens([(("", ""), ids[0].tolist(), [token]) for token in (best, (best + 1) % 256)])
    assert [greedy for _, greedy in found] == [True, False]


def test_scores_in_pieces_are_those_of_all_at_once(model, tokenizer, monkeypatch):
    """On a CPU to the bit; on a card, where the head computes a few positions at a time, within rounding."""
    live = harness.LiveModel(model, tokenizer, harness.Forward(3, "fp32"))
    ends = [[7], [7, 8], [7, 9], [9, 8, 7, 6, 5], [9, 8, 7, 6, 4]]
    asked = [(("", ""), [*range(3, 10 + n)], end) for n in range(5) for end in ends]
    expected = live._loglikelihood_tokens(asked)
    monkeypatch.setattr(chunked_losses, "MOST_BYTES", 3 * chunked_losses.LOGIT_BYTES * model.config.vocab_size)
    assert live._loglikelihood_tokens(asked) == expected
    seen = []
    head = model.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    monkeypatch.setattr(chunked_losses, "positions_at_once", lambda model: 4)
    found = live._loglikelihood_tokens(asked)
    head.remove()
    assert max(seen) == 4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_the_prompt_is_mmlus_letter_by_letter(model, tokenizer, folder):
    prompts = []
    ask(model, tokenizer, folder, shots=2, batch_size=1, on_batch=lambda batch: prompts.append(batch.input_ids[0]))
    expected = (
        "The following are multiple choice questions (with answers) about us history.\n\n"
        "Q100?\nA. w100\nB. x100\nC. y100\nD. z100\nAnswer: A\n\n"
        "Q101?\nA. w101\nB. x101\nC. y101\nD. z101\nAnswer: B\n\n"
        "Q5?\nA. w5\nB. x5\nC. y5\nD. z5\nAnswer:"
    )
    assert expected in [tokenizer.decode(p) for p in prompts]


def test_lm_evals_own_task_asks_the_same(model, tokenizer, folder, monkeypatch):
    rows = {split: (folder / f"{split}.jsonl").read_text() for split in ("dev", "test")}

    def from_hub(path, name, **_):
        assert path == "cais/mmlu"
        every = {s: [json.loads(line) | {"subject": name} for line in rows[s].splitlines()[:4]] for s in rows}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(r) for split, r in every.items()})

    prompts = {"hub": [], "local": []}
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    hub = ask(
        model, tokenizer, "hub", shots=2, questions=57,
        on_batch=lambda batch: prompts["hub"].extend(texts(tokenizer, batch)),
    )  # fmt: skip
    monkeypatch.undo()
    assert (hub.questions, len(hub.by_subject)) == (57, 57)
    ask(
        model, tokenizer, folder, shots=2,
        on_batch=lambda batch: prompts["local"].extend(texts(tokenizer, batch)),
    )  # fmt: skip
    assert next(p for p in prompts["hub"] if "anatomy" in p) in prompts["local"]


def texts(tokenizer, batch) -> list[str]:
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]


def test_a_hub_out_of_reach_is_said_in_one_line(model, tokenizer, monkeypatch):
    def away(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(DataError, match=r"MMLU from the hub: it cannot be loaded \(no route\)"):
        ask(model, tokenizer, "hub")


def test_one_forward_pass_gives_all_four_letters(model, tokenizer, folder):
    calls, announced, done = [], [], []
    handle = model.register_forward_hook(lambda *_: calls.append(len(announced)))
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        ask(
            model, tokenizer, folder, batch_size=4,
            on_batch=lambda batch: announced.append(batch.input_ids.shape[0]), on_rows=done.append,
        )  # fmt: skip
    assert announced == [4, 4, 2]
    assert done == announced
    assert calls == [1, 2, 3]  # every batch is announced before it is computed


def test_batches_and_padding_do_not_matter(model, tokenizer, folder):
    scores = [ask(model, tokenizer, folder, batch_size=size).by_subject for size in (1, 3, 10)]
    assert scores[0] == scores[1] == scores[2]


def test_a_draw_is_even_and_the_same_for_a_seed():
    sizes = {"a": 2, "b": 50, "c": 50, "d": 9}
    drawn = draw(sizes, 20, seed=4)
    assert {name: len(set(drawn[name])) for name in sizes} == {"a": 2, "b": 6, "c": 6, "d": 6}
    assert drawn == draw(dict(reversed(sizes.items())), 20, seed=4)
    assert drawn != draw(sizes, 20, seed=5)
    assert all(indices == sorted(indices) and max(indices) < sizes[name] for name, indices in drawn.items())
    assert all(set(drawn[name]) <= set(draw(sizes, 40, seed=4)[name]) for name in drawn)
    assert draw(sizes, None, seed=4) == {name: list(range(size)) for name, size in sizes.items()}
    assert draw(sizes, 10_000, seed=4) == draw(sizes, None, seed=4)


def test_fewer_questions_than_subjects_take_subjects_at_random():
    sizes = {f"s{number}": 1 + number for number in range(10)}
    seen = Counter(name for seed in range(60) for name in draw(sizes, 3, seed))
    assert sum(seen.values()) == 180
    assert min(seen[name] for name in sizes) >= 6  # 18 expected of each


def test_questions_are_asked_as_drawn(model, tokenizer, folder):
    right = by_hand(model, tokenizer, folder, 0)
    drawn = draw({f"mmlu_{subject}": size for subject, size in SIZES.items()}, 5, seed=8)
    answers = [right[name.removeprefix("mmlu_")][index] for name, indices in drawn.items() for index in indices]
    result = ask(model, tokenizer, folder, questions=5, seed=8)
    assert (result.questions, result.accuracy) == (5, sum(answers) / 5)


def test_nothing_is_shown_copied_or_left_behind(model, tokenizer, folder, capfd, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.DEBUG, logger="lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bars = datasets.are_progress_bars_disabled()
    before = torch.random.get_rng_state()
    ask(model, tokenizer, folder, shots=1)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval").level) == (bars, logging.DEBUG)
    assert not caplog.records


def test_without_lm_eval_the_remedy_is_named(monkeypatch, folder):
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "flexperts.evaluation.harness")
    monkeypatch.delattr("flexperts.evaluation.harness")
    with pytest.raises(ConfigError, match=re.escape("pip install 'flexperts[knowledge]'")):
        check_source(str(folder), 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 4}, "row 1: answer is not valid: it must be 0, 1, 2 or 3"),
        ({"answer": "1"}, "answer is not valid"),
        ({"answer": True}, "answer is not valid"),
        ({"answer": 1.0}, "answer is not valid"),
        ({"choices": ["a", "b", "c"]}, "a list of four texts"),
        ({"choices": "abcd"}, "a list of four texts"),
        ({"subject": " "}, "subject and question must be texts"),
        ({"question": None}, "subject and question must be texts"),
    ],
)
def test_a_bad_row_is_named(folder, change, words):
    write(folder / "test.jsonl", [question("anatomy", 1, 0) | change])
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        check_source(str(folder), 0)
    assert str(folder / "test.jsonl") in str(caught.value)


def test_missing_and_empty_files_and_too_many_shots_are_refused(folder):
    check_source(str(folder), 2)
    with pytest.raises(DataError, match=r"dev\.jsonl, subject anatomy: 2 dev rows: 3 shots need 3 dev rows"):
        check_source(str(folder), 3)
    with pytest.raises(ConfigError, match="-1 shots"):
        check_source(str(folder), -1)
    with pytest.raises(ConfigError, match="0 questions"):
        draw({"a": 1}, 0, seed=0)
    (folder / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="it contains no question"):
        check_source(str(folder), 0)
    (folder / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"dev\.jsonl"):
        check_source(str(folder), 0)


def test_without_shots_a_subject_needs_no_dev_rows(folder, model, tokenizer):
    write(folder / "dev.jsonl", [question("anatomy", 1, 0)])
    assert ask(model, tokenizer, folder).questions == 10


@pytest.mark.parametrize("behind", ["<s> $A </s>", "$A </s>", "<s> $A"])
def test_a_tokenizer_that_ends_every_text_asks_the_same_letters(model, tokenizer, folder, behind):
    """With EOS behind question and answer, all four answers would be compared by their EOS too."""
    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=behind, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    live = harness.LiveModel(model, ending, harness.Forward(3, "fp32"))
    _, letter = live._encode_pair("Answer:", " A")
    assert letter == tokenizer(" A")["input_ids"]
    front = [256] if behind.startswith("<s>") else []
    assert live.tok_encode("Q") == [*front, *tokenizer("Q")["input_ids"]]
    assert live.tok_encode("Q", add_special_tokens=False) == tokenizer("Q")["input_ids"]
    if not front:
        assert ask(model, ending, folder) == ask(model, tokenizer, folder)


def test_control_tokens_in_questions_are_text(model, tokenizer, folder):
    live = harness.LiveModel(model, tokenizer, harness.Forward(3, "fp32"))
    tokens = live.tok_encode("Is </s> the end?<pad>")
    assert max(tokens) < 256
    assert tokenizer.decode(tokens) == "Is </s> the end?<pad>"


def test_likelihoods_that_are_no_numbers_are_no_score(model, tokenizer, folder):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="a likelihood: it is not a number"):
        ask(broken, tokenizer, folder)
