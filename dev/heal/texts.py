"""The texts of healing: files, the shipped calibration texts, and what the dense parent writes itself.

The parent answers ChatML prompts at temperature 1: a user's requests (a task and a topic), and shipped paragraphs
to continue from their first words. The held-out texts are in neither.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example, PromptEncoder
from flexperts.data.sources import read_source
from flexperts.errors import ConfigError
from flexperts.files import read_json, write_json
from flexperts.seeding import derive_seed, generator
from flexperts.smol_moe.calibrate import read_texts
from flexperts.smol_moe.dense import EOS_ID, PAD_ID, DenseModel

Report = Callable[[str], None]
PLAIN = (".txt", ".md")
WORDS = 12
"""First words of a paragraph that the parent continues."""

TASKS = (
    "Explain {} to a beginner.",
    "Write a short story about {}.",
    "List ten facts about {}.",
    "What are common mistakes about {}, and how are they avoided?",
    "Write an email that asks a colleague about {}.",
    "Write a dialogue between two people who disagree about {}.",
    "Give step-by-step instructions for someone who has to deal with {}.",
    "Write three exam questions on {}, with answers.",
    "Summarize what is known about {} in one paragraph, and then in one sentence.",
    "Write a Python program related to {}, and explain it.",
    "Write a news report on {}.",
    "Compare {} today with {} a hundred years ago, as a table.",
)
TOPICS = (
    "volcanoes", "fractions", "public transport", "a rental contract", "bread", "chess", "vaccines", "inflation",
    "bees", "a job interview", "electric motors", "the French Revolution", "sorting numbers", "football", "sleep",
    "poetry", "databases", "gardening", "the ocean", "photography", "elections", "black holes", "jazz", "insurance",
    "river floods", "probability", "cheese", "mountain rescue", "passwords", "castles", "dogs", "wind power",
)  # fmt: skip


def read_files(files: Sequence[str], dense: DenseModel) -> list[list[int]]:
    """Return the tokens of each text: a plain file is one, a row of instruction data is one ChatML turn."""
    found: list[list[int]] = []
    for file in files:
        if Path(file).suffix in PLAIN:
            found.append(list(dense.tokenizer(_text(file))["input_ids"]))
            continue
        encoder = PromptEncoder(dense.tokenizer, max_length=dense.config.max_position_embeddings)
        found += [list(encoder.encode(row).input_ids) for row in read_source(file, {})]
    return found


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {file}", f"it cannot be read ({error})", "give a UTF-8 file") from error


def shipped(dense: DenseModel) -> list[list[int]]:
    """Return the tokens of the shipped calibration texts."""
    return [list(dense.tokenizer(text)["input_ids"]) for text in read_texts().values()]


def prompts() -> list[str]:
    """Return the prompts that the parent answers, as ChatML."""
    asked = [task.format(*[topic] * task.count("{}")) for task, topic in product(TASKS, TOPICS)]
    for text in read_texts().values():
        paragraphs = re.sub(r"<\|im_\w+\|>", " ", text).split("\n\n")
        asked += [
            f"Continue this text: {' '.join(p.split()[:WORDS])}" for p in paragraphs if len(p.split()) > WORDS
        ]
    return [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked]


def written_by(
    parent: Any, dense: DenseModel, folder: Path, *, rows: int, batch: int, length: int, seed: int, report: Report
) -> list[list[int]]:
    """Return the tokens of rows that the parent writes.

    Args:
        parent: The dense model, on the device that computes.
        dense: Its tokenizer.
        folder: Keeps each batch as JSON, so that an interrupted run continues after its last batch.
        rows: Number of rows.
        batch: Rows that are sampled at once.
        length: Most new tokens of a row.
        seed: Of prompts and samples.
        report: Receives a line for each new batch.
    """
    asked = [tuple(dense.tokenizer(text)["input_ids"]) for text in prompts()]
    found: list[list[int]] = []
    while len(found) < rows:
        file, began = folder / f"{len(found):06}.json", time.perf_counter()
        if not file.exists():
            draw, count = generator(seed, "prompts", len(found)), min(batch, rows - len(found))
            picked = [asked[i] for i in torch.randint(len(asked), (count,), generator=draw).tolist()]
            made = _sampled(parent, picked, length, derive_seed(seed, "samples", len(found)))
            write_json(file, made, indent=None)
            speed = sum(map(len, made)) / (time.perf_counter() - began)
            report(f"own text: {len(found) + count}/{rows} rows, {speed:.0f} tokens/s")
        found += read_json(file)
    return found


@torch.no_grad()
def _sampled(parent: Any, asked: Sequence[tuple[int, ...]], length: int, seed: int) -> list[list[int]]:
    """Return each prompt with its sampled answer, without padding."""
    padded = pad_batch([Example(tokens, len(tokens)) for tokens in asked], PAD_ID)
    device = parent.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        whole = parent.generate(
            input_ids=padded.input_ids.to(device),
            attention_mask=padded.attention_mask.to(device),
            max_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    answers = whole[:, padded.input_ids.shape[1] :].tolist()
    return [[*tokens, *_until_end(answer)] for tokens, answer in zip(asked, answers, strict=True)]


def _until_end(answer: list[int]) -> list[int]:
    return answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer


def in_rows(texts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Join texts, each followed by ``<|endoftext|>``, and cut them into whole rows ``[N, length]``."""
    joined = torch.tensor([token for text in texts for token in (*text, PAD_ID)])
    count = len(joined) // length
    if not count:
        rule = f"they are {len(joined)} tokens, less than one row of {length}"
        raise ConfigError("the texts", rule, "give more texts or a smaller --length")
    return joined[: count * length].view(count, length)
