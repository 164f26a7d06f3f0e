"""One round of FLEx, step by step: two silos and a tiny Mixture-of-Experts model, a few seconds on one core.

    python examples/one_round.py

The silos answer the same messages in different styles, so no single model suits both. Each silo trains LoRA on
attention together with one personal expert per MoE layer. It sends only the LoRA weights; the server averages them.

The base is random: the losses show that the steps work, not how well FLEx does on real data. `run_federation` takes
these steps for many rounds, with checks, files and resuming: see quickstart.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from flwr.app import RecordDict
from torch import Tensor

from flexperts import Grafts, find_experts, reconstruction_scores, split_parameters
from flexperts.communication.average import weighted_mean
from flexperts.communication.messages import Update, encode, metrics_of, payload_of, records
from flexperts.communication.traffic import encoded_bytes, personal_bytes
from flexperts.config.model import LoraConfig, ModelConfig
from flexperts.config.run import TrainingConfig
from flexperts.data.batches import pad_batch
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import Row
from flexperts.evaluation.scores import EvaluationSettings, evaluate
from flexperts.modeling.load import load_base
from flexperts.modeling.lora import LoraAdapters
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.vector import copy_tensors
from flexperts.testing import save_tiny_base
from flexperts.training.local import LocalSettings, train_local

STYLES = {"help_desk": "FAULT: {}. ACTION: replace.", "shop": "So sorry! Your new {} is on its way."}
TRAIN, TEST = ("printer", "kettle", "lamp", "radio", "heater", "fan"), ("toaster", "iron")


def main() -> list[Silo]:
    with TemporaryDirectory() as folder:
        base = save_tiny_base(Path(folder), hidden_size=128)  # in place of a pretrained MoE model
        silos = [open_silo(name, base) for name in STYLES]  # steps 1 to 3: select, graft, split

    messages = {}
    for silo in silos:
        train(silo)  # step 4
        messages[silo.name] = send(silo)  # step 5
    shared = average(messages)  # step 6
    for silo in silos:
        copy_tensors(shared, silo.split.shared)  # step 7, give back; the personal weights stay as they are

    print("Mean loss on each silo's own test rows (nats per token), and the size of its message (bytes)")
    print("silo       untouched  global  personalized   sent  personal")
    for silo in silos:
        message, (untouched, averaged, personalized) = messages[silo.name], losses(silo)  # step 8, evaluate
        sent, personal = encoded_bytes(message), personal_bytes(message, silo.split.personal)
        print(f"{silo.name:9}  {untouched:9.2f}  {averaged:6.2f}  {personalized:12.2f}  {sent:5}  {personal:8}")
    return silos


@dataclass
class Silo:
    name: str
    encoder: PromptEncoder
    lora: LoraAdapters
    grafts: Grafts
    split: ParameterSplit


def rows(name: str, things: Sequence[str]) -> list[Row]:
    return [Row(f"My {thing} is broken.", STYLES[name].format(thing)) for thing in things]


def open_silo(name: str, folder: Path) -> Silo:
    """Load a silo's own copy of the base, add what it trains, and decide who owns which parameter."""
    base = load_base(ModelConfig(base=str(folder), dtype="float32", device="cpu"))  # all its weights are frozen
    encoder, experts = PromptEncoder(base.tokenizer), find_experts(base.model)

    # 1. Select: in each MoE layer, the expert whose output is closest to the layer's, on the silo's own rows.
    batch = pad_batch(encoder.encode_all(rows(name, TRAIN)), encoder.tokenizer.pad_token_id)
    batches = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}]
    stream = torch.Generator().manual_seed(0)
    scores = reconstruction_scores(lambda b: base.model(**b), experts, batches, max_tokens=8192, generator=stream)
    choice = {layer.name: layer.best(1) for layer in scores}

    # 2. Graft: add a trainable copy of that expert to the layer, through a sigmoid gate; the router is unchanged.
    grafts = Grafts(experts, choice).attach()
    # LoRA is the shared part. Every silo uses the same seed, so all start from the same shared weights.
    lora = LoraAdapters(base.model, LoraConfig(rank=8, alpha=16), seed=0)

    # 3. Split: each parameter is shared, personal or frozen; one that trains without an owner is an error.
    shared, personal = lora.parameters(), {f"graft.{n}": p for n, p in grafts.named_parameters()}
    split = split_parameters({**lora.frozen(), **shared, **personal}, shared=shared, personal=personal)
    return Silo(name, encoder, lora, grafts, split)


def train(silo: Silo) -> None:
    """4. Train the shared and the personal weights together, on the silo's own rows."""
    settings = LocalSettings(
        training=TrainingConfig(batch_size=6, lr=0.01, personal_lr=0.03),
        precision="fp32",
        pad_token_id=silo.encoder.tokenizer.pad_token_id,
        steps=40,
        total_steps=400,  # the learning rate falls over ten such rounds; this is the first
    )
    examples = silo.encoder.encode_all(rows(silo.name, TRAIN))
    train_local(silo.lora.model, silo.split, examples, settings, torch.Generator().manual_seed(0))


def send(silo: Silo) -> RecordDict:
    """5. Return the silo's message; `encode` takes the split's shared group and refuses every other parameter."""
    return records({"client": silo.name}, {"rows": len(TRAIN)}, encode(silo.split))


def average(messages: dict[str, RecordDict]) -> dict[str, Tensor]:
    """6. On the server, which needs no model: return the mean of the shared weights, weighted by rows."""
    updates = [Update(n, payload_of(m, n), metrics_of(m)["rows"], {}) for n, m in sorted(messages.items())]
    return updates[0].payload.manifest.unflatten(weighted_mean(updates))


def losses(silo: Silo) -> list[float | None]:
    """8. Score the untouched base, the averaged LoRA alone, and LoRA with the silo's own experts and gates."""

    def loss() -> float | None:
        settings = EvaluationSettings(max_new_tokens=1, batch_size=2, precision="fp32", answers=False)
        return evaluate(silo.lora.model, silo.encoder, rows(silo.name, TEST), settings).nll

    with silo.grafts.disabled():
        averaged = loss()
        with silo.lora.use():  # without an adapter
            untouched = loss()
    return [untouched, averaged, loss()]


if __name__ == "__main__":
    main()
