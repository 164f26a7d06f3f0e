"""Retained knowledge: accuracy on MMLU (Hendrycks et al., 2021) with lm-eval's prompts and scoring.

Questions come from a folder with ``dev.jsonl`` and ``test.jsonl`` (fields: subject, question, choices, answer), or
from the hub through lm-eval's task. Both give the same prompts: a line that names the subject, solved examples of
the same subject from dev, the question with the choices A to D, and "Answer:".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flexperts.data.bad_rows import BadRow, settle_bad_rows
from flexperts.data.batches import PaddedBatch
from flexperts.data.records import whole_number
from flexperts.data.sources import open_table
from flexperts.errors import ConfigError, DataError, optional
from flexperts.modeling.forward import Precision
from flexperts.seeding import generator

HUB = "hub"
_PREFIX = "mmlu_"
_LETTERS = ["A", "B", "C", "D"]
_COLUMNS = ("subject", "question", "choices", "answer")
_TASK = {
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{question.strip()}}\n"
    + "".join(f"{letter}. {{{{choices[{index}]}}}}\n" for index, letter in enumerate(_LETTERS))
    + "Answer:",
    "doc_to_choice": _LETTERS,
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@dataclass(frozen=True)
class KnowledgeScore:
    """A model state's MMLU score.

    Args:
        accuracy: Share of right answers over all questions, 0 to 1; guessing gives 0.25.
        stderr: Standard error of the accuracy over questions.
        questions: Questions asked.
        by_subject: Subject -> share of right answers.
    """

    accuracy: float
    stderr: float
    questions: int
    by_subject: Mapping[str, float]


def mmlu(
    model: Any,
    tokenizer: Any,
    source: str,
    *,
    questions: int | None,
    shots: int,
    batch_size: int,
    precision: Precision,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_batch: Callable[[PaddedBatch], None] | None = None,
) -> KnowledgeScore:
    """Return a model's score on MMLU questions.

    The answer is the most likely of the letters A to D after the prompt. Prompts are plain text, without a chat
    template, as in lm-eval by default.

    Args:
        model: A causal language model in eval mode.
        tokenizer: The model's tokenizer.
        source: A folder with dev.jsonl and test.jsonl, or ``"hub"``.
        questions: Number of questions, drawn evenly over subjects by the seed; None for all.
        shots: Solved examples before each question, 0 to the number of dev rows of a subject (MMLU has 5).
        batch_size: Questions per forward pass.
        precision: As in training.
        seed: Seed of the draw: the same seed and files give the same questions.
        on_rows: Called with the number of questions after each batch.
        on_batch: Called with the prompts of every batch before it is computed.
    """
    harness = _harness()
    tasks = _tasks(harness, source, shots)
    samples = draw({name: len(task.eval_docs) for name, task in tasks.items()}, questions, seed)
    how = harness.Forward(batch_size, precision, on_rows, on_batch)
    return _summarize(harness.correct_answers(model, tokenizer, tasks, samples, shots, how))


def check_source(source: str, shots: int) -> None:
    """Check before a run what ``mmlu`` would only find after it; the hub is not contacted."""
    harness = _harness()
    if source != HUB:
        _tasks(harness, source, shots)


def draw(sizes: Mapping[str, int], questions: int | None, seed: int) -> dict[str, list[int]]:
    """Return the indices of drawn questions by subject, in ascending order.

    Subjects take turns in a random order; each gives one random question per turn, until enough are drawn. Subjects
    with questions left thus differ by at most one. With the same seed, a larger draw contains every smaller one.
    """
    if questions is not None and questions < 1:
        raise ConfigError(f"{questions} questions", "at least 1 must be asked", "ask 1 or more, or all")
    names = sorted(sizes)
    order = torch.randperm(len(names), generator=generator(seed, "mmlu", "subjects")).tolist()
    turns = sorted(
        (turn, place, name, index)
        for name, place in zip(names, order, strict=True)
        for turn, index in enumerate(_shuffled(name, sizes[name], seed))
    )
    drawn: dict[str, list[int]] = defaultdict(list)
    for _, _, name, index in turns[:questions]:
        drawn[name].append(index)
    return {name: sorted(drawn[name]) for name in names if name in drawn}


def _shuffled(name: str, size: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=generator(seed, "mmlu", name)).tolist()
    return order


def _harness() -> ModuleType:
    with optional("knowledge", "MMLU"):
        from flexperts.evaluation import harness
    return harness


def _tasks(harness: ModuleType, source: str, shots: int) -> dict[str, Any]:
    """Return lm-eval's tasks, one per subject; each has enough solved examples."""
    if shots < 0:
        raise ConfigError(f"{shots} shots", "it must not be negative", "use 0 to 5")
    if source == HUB:
        return _from_hub(harness, shots)
    dev, test = (_read(Path(source) / f"{split}.jsonl") for split in ("dev", "test"))
    for subject in test:
        _check_shots(f"{Path(source) / 'dev.jsonl'}, subject {subject}", len(dev.get(subject, [])), shots)
    return {
        f"{_PREFIX}{subject}": harness.local_task(
            f"{_PREFIX}{subject}",
            _TASK | {"description": _description(subject)},
            # lm-eval requires a split of examples even where none are shown.
            {"test": test[subject], "dev": dev.get(subject) or test[subject][:1]},
        )
        for subject in sorted(test)
    }


def _from_hub(harness: ModuleType, shots: int) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = harness.hub_tasks("mmlu", "mmlu/default")
    except Exception as error:  # the libraries raise many kinds; each means that the questions cannot be loaded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            "MMLU from the hub",
            f"it cannot be loaded ({reason})",
            "check the network, or give a folder with dev.jsonl and test.jsonl",
        ) from error
    for name, task in tasks.items():
        _check_shots(name, len(task.fewshot_docs()), shots)
    return tasks


def _check_shots(where: str, rows: int, shots: int) -> None:
    if rows < shots:
        raise DataError(
            f"{where}: {rows} dev rows", f"{shots} shots need {shots} dev rows", "use fewer shots or add rows"
        )


def _description(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return a file's rows by subject."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    bad: list[BadRow] = []
    for record in open_table(str(path), _COLUMNS).records(_COLUMNS):
        if fault := record.fault or _fault(record.values):
            bad.append(BadRow(f"{path}, {record.place}", *fault))
            continue
        subject, question, choices, answer = (record.values[name] for name in _COLUMNS)
        row = {"subject": subject, "question": question, "choices": choices, "answer": whole_number(answer)}
        rows[subject].append(row)
    settle_bad_rows(str(path), bad, len(bad) + sum(map(len, rows.values())), None)
    if not rows:
        raise DataError(f"{path}", "it contains no question", "add rows with subject, question, choices, answer")
    return dict(rows)


def _fault(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what is wrong with a question, and the rule; None if it is valid."""
    subject, question, choices, answer = (values.get(name) for name in _COLUMNS)
    if not (_text(subject) and _text(question)):
        return "subject or question is missing", "subject and question must be texts that are not empty"
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        return "choices is not valid", "it must be a list of four texts"
    if whole_number(answer) not in range(4):
        return "answer is not valid", "it must be 0, 1, 2 or 3, the index of the right choice"
    return None


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _summarize(correct: Mapping[str, list[bool]]) -> KnowledgeScore:
    answers = [answer for subject in correct.values() for answer in subject]
    accuracy = _share(answers)
    error = (accuracy * (1 - accuracy) / max(1, len(answers) - 1)) ** 0.5
    shares = {name.removeprefix(_PREFIX): _share(subject) for name, subject in correct.items()}
    return KnowledgeScore(accuracy, error, len(answers), shares)


def _share(answers: Iterable[bool]) -> float:
    values = list(answers)
    return sum(values) / len(values)
