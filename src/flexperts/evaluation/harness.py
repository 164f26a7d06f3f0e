"""Multiple-choice tasks of lm-eval on a model in memory. Import this module only where lm-eval is installed.

lm-eval makes prompts and scores. The model is called here, because every batch of prompts must be announced first
(``on_batch``), rows are padded on the left, and answers that share a prompt need only one forward pass.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval import tasks as task_folder
from lm_eval.api import task as task_module
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor

from flexperts.data.batches import PaddedBatch, pad_batch
from flexperts.data.prompts import Example
from flexperts.data.tokens import TokenEncoder
from flexperts.errors import ModelError
from flexperts.modeling.chunked_losses import scored_logits
from flexperts.modeling.forward import Precision, autocast

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""A request of lm-eval: (context, continuation), the context's tokens, the continuation's tokens."""
_LENGTH = 2048
"""Longest prompt for a model whose config has no limit, in tokens; lm-eval's default."""


@dataclass(frozen=True)
class Forward:
    """Settings of the forward passes.

    Args:
        batch_size: Prompts per forward pass.
        precision: As in training.
        on_rows: Called with the number of prompts after each batch.
        on_batch: Called with the prompts of each batch before it is computed.
    """

    batch_size: int
    precision: Precision
    on_rows: Callable[[int], None] = lambda rows: None
    on_batch: Callable[[PaddedBatch], None] | None = None


def local_task(name: str, config: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Return an lm-eval task on rows in memory; nothing is copied into a dataset cache.

    Args:
        name: The task's name.
        config: The task's other settings, as in a YAML file of lm-eval.
        rows: Split -> rows.
    """

    def in_memory() -> Any:
        return datasets.DatasetDict({s: datasets.Dataset.from_list([dict(r) for r in rows[s]]) for s in rows})

    with quiet():
        return ConfigurableTask(config={"task": name, "custom_dataset": in_memory, **config})


def hub_tasks(group: str, folder: str) -> dict[str, Any]:
    """Return the tasks of one of lm-eval's groups, by name; their data come from the hub or its local cache.

    Args:
        group: The group's name.
        folder: The group's folder in lm-eval's folder of tasks; searching all of them takes seconds.
    """
    path = Path(task_folder.__file__).parent / folder
    with quiet():
        return dict(TaskManager(include_defaults=False, include_path=str(path)).load([group])["tasks"])


def correct_answers(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], samples: Mapping[str, list[int]], shots: int, how: Forward
) -> dict[str, list[bool]]:
    """Return, for every question of every task, whether the model's most likely answer is right.

    Args:
        model: A causal language model in eval mode.
        tokenizer: The model's tokenizer.
        tasks: lm-eval's tasks by name, each with the metric ``acc``.
        samples: Task -> indices of the questions that are asked.
        shots: Solved examples before each question.
        how: Batches and precision.
    """
    asked = {name: task for name, task in tasks.items() if samples.get(name)}
    for task in asked.values():
        task.set_config(key="num_fewshot", value=shots)
    with quiet():
        results = evaluate(
            lm=LiveModel(model, tokenizer, how),
            task_dict={"tasks": asked, "groups": {}},
            samples=dict(samples),
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: [bool(sample["acc"]) for sample in results["samples"][name]] for name in asked}


class LiveModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Adapter from a model in memory to lm-eval, for tasks that compare likelihoods of given answers.

    Args:
        model: A causal language model in eval mode.
        tokenizer: The model's tokenizer.
        how: Batches and precision.
    """

    def __init__(self, model: Any, tokenizer: Any, how: Forward) -> None:
        super().__init__()
        self.model, self.tokenizer, self.how = model, tokenizer, how
        text = model.config.get_text_config()
        self._texts = TokenEncoder(tokenizer, text.vocab_size, str(tokenizer.chat_template or ""))
        self.max_length: int = getattr(text, "max_position_embeddings", None) or _LENGTH

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token used for an empty context: BOS if there is one, as in lm-eval's model class; else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the text's tokens, with the tokenizer's leading tokens unless they are turned off."""
        return self._texts.plain(string, beginning=add_special_tokens is not False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return every continuation's log-likelihood (nats) and whether greedy decoding produces it."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Refuse: these tasks are multiple-choice."""
        raise NotImplementedError("only multiple-choice tasks are asked")

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Refuse: these tasks are multiple-choice."""
        raise NotImplementedError("only multiple-choice tasks are asked")

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        groups = sorted(self._shared(requests).items(), key=lambda group: -len(group[0].input_ids))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(groups), self.how.batch_size):
            chosen = groups[start : start + self.how.batch_size]
            asked = [(row, index) for row, (_, members) in enumerate(chosen) for index in members]
            told = [(row, requests[i][2]) for row, i in asked]
            scores = _summed(self._scores([e for e, _ in chosen], told), [len(tokens) for _, tokens in told])
            found |= {index: each for (_, index), each in zip(asked, scores, strict=True)}
            self.how.on_rows(len(chosen))
        return [found[index] for index in range(len(requests))]

    def _shared(self, requests: Sequence[Encoded]) -> dict[Example, list[int]]:
        """Group requests that differ only in their last token: one forward pass is enough for each group.

        The last token is replaced by zero, since nothing is predicted from it. Contexts are cut on the left to fit.
        """
        groups = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (*context, *continuation[:-1], 0)[-self.max_length :]
            groups[Example(tokens, len(tokens) - len(continuation))].append(index)
        return groups

    def _scores(self, examples: Sequence[Example], asked: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Return tokens' log-probabilities, and whether each is the most likely one: ``[2, Q]``, on the CPU.

        Only these values leave the device, not those of the whole vocabulary.

        Args:
            examples: The rows.
            asked: The row and the tokens of each continuation, Q in all; it ends in the row's last column.
        """
        pad = self.tokenizer.pad_token_id or 0
        if self.how.on_batch:
            self.how.on_batch(pad_batch([Example(e.prompt, e.prompt_length) for e in examples], pad))
        batch, device = pad_batch(examples, pad), next(self.model.parameters()).device
        ends = [(row + 1) * batch.response_columns - len(told) for row, told in asked]
        wanted = [
            (end + n, token) for end, (_, told) in zip(ends, asked, strict=True) for n, token in enumerate(told)
        ]
        at, tokens = torch.tensor(wanted).T
        order = at.argsort()
        places, position, numbers = at[order].unique_consecutive(return_inverse=True, return_counts=True)
        moved = torch.cat([places, position, tokens[order]]).to(device)
        places, position, tokens = torch.split(moved, [len(places), len(order), len(order)])
        found, done, scored = [], 0, 0
        with autocast(device, self.how.precision):
            for logits in scored_logits(self.model, batch, places):
                few = slice(scored, scored := scored + int(numbers[done : done + len(logits)].sum()))
                row, token, scores = position[few] - done, tokens[few], logits.log_softmax(-1)
                found.append(torch.stack([scores[row, token], scores.argmax(-1)[row] == token]))
                done += len(logits)
        return torch.cat(found, dim=1).cpu()[:, order.argsort()]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the log lines and progress bars of lm-eval and datasets inside the block."""
    log, bars, hidden = logging.getLogger("lm_eval"), task_module.tqdm, datasets.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task_module.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        log.setLevel(level)
        task_module.tqdm = bars
        if not hidden:
            datasets.enable_progress_bars()


def _summed(scores: Tensor, lengths: Sequence[int]) -> Iterator[tuple[float, bool]]:
    """Yield each continuation's log-probability, and whether each of its tokens is the most likely one.

    Args:
        scores: Every token's log-probability, and whether it is the most likely one, ``[2, Q]``.
        lengths: The continuations' tokens, Q in all.
    """
    for value, hit in zip(*(each.split(lengths) for each in scores), strict=True):
        total = float(value.sum())
        if math.isnan(total):
            raise ModelError(
                "a likelihood",
                "it is not a number",
                "see not_finite in the run's summary.json for the affected states",
            )
        yield total, bool(hit.all())
