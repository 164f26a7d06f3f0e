"""What both rivals do for one client and round: rows become tokens, a Trainer is built, trains and is deleted.

Both projects use TRL's SFTTrainer. OpenFedLLM pins TRL 0.7, where that is transformers' Trainer with the
tokenizing of the rows before it, and that is used here: on a CPU it is faster than today's SFTTrainer,
which computes the vocabulary projection a second time in its backward pass.

Fairness: bf16 autocast as in flexperts, no gradient checkpointing, no logging, no files. The rows come in the
order of flexperts' batches, so that all train on the same ones.
"""

from __future__ import annotations

from typing import Any

import torch
from bare_loop import with_lora
from datasets import Dataset
from datasets.utils import disable_progress_bars
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments
from work import BATCH, STEPS, Work

from flexperts.data.rows import Row

disable_progress_bars()


def adapted_model(work: Work) -> PeftModel:
    """Load the base with transformers alone, and put the run's LoRA into it."""
    return with_lora(AutoModelForCausalLM.from_pretrained(work.base, dtype=torch.bfloat16), work)


def texts(work: Work, name: str) -> Dataset:
    """Return a client's rows as text."""
    return Dataset.from_list([_text(row, work.encoder.tokenizer) for row in work.clients[name].train])


def train(work: Work, model: Any, tokenizer: Any, rows: Dataset, number: int) -> tuple[int, int]:
    """Train on a round's rows with a new trainer; return optimizer steps and tokens."""
    settings = TrainingArguments(
        output_dir="not-written",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        max_grad_norm=work.config.training.max_grad_norm,
        bf16=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokens = rows.map(_tokens, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows.column_names)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return _padded(batch, tokenizer.pad_token_id)

    trainer = Trainer(model, settings, collate, train_dataset=tokens, optimizers=work.optimizer(model, number))
    trainer.train()
    return trainer.state.global_step, sum(map(len, tokens["input_ids"]))


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    question = [{"role": "user", "content": f"{row.instruction}\n\n{row.context}"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return {"prompt": str(prompt), "response": f"{row.response}{tokenizer.eos_token}"}


def _tokens(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Return a row's tokens, and its labels: the response."""
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    ids = tokenizer(row["prompt"] + row["response"])["input_ids"]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def _padded(batch: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Join rows, padded on the right."""

    def column(name: str, filler: int) -> Tensor:
        return pad_sequence([torch.tensor(row[name]) for row in batch], batch_first=True, padding_value=filler)

    ids = column("input_ids", pad)
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    return {
        "input_ids": ids,
        "labels": column("labels", -100),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths).long(),
    }
