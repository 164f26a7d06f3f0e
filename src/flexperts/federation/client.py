"""One client: it joins, trains a round, evaluates. Nothing here knows Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexperts.artifacts import write_text
from flexperts.communication.messages import Update, encode_shared
from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.data.rows import ClientRows, Row
from flexperts.evaluation.scores import EvaluationSettings, Scores, evaluate
from flexperts.federation.client_model import ClientModel
from flexperts.federation.observer import Observer
from flexperts.federation.workspace import Workspace
from flexperts.grafting.grafts import Grafts
from flexperts.grafting.selection import Batch, reconstruction_scores
from flexperts.methods.base import State
from flexperts.modeling.forward import autocast
from flexperts.parameters.split import ParameterSplit
from flexperts.parameters.store import PersonalMeta, load_personal, save_personal
from flexperts.parameters.vector import Vector, load_vector, vector_hash
from flexperts.seeding import generator
from flexperts.training.local import LocalSettings, steps_per_round


@dataclass(frozen=True)
class Trained:
    """What a round of training leaves for the reply.

    Args:
        update: What is sent.
        split: The parameters it came from, by which the reply's encoding is checked.
    """

    update: Update
    split: ParameterSplit


class Client:
    """One silo's side of the federation.

    Args:
        name: The client's name.
        workspace: Resident base and rows.
        model: The model that clients take turns on.
        folder: Where its personal state and predictions are kept.
        observer: Receives progress.
    """

    def __init__(
        self, name: str, workspace: Workspace, model: ClientModel, folder: Path, observer: Observer | None = None
    ) -> None:
        self.name, self.workspace, self.model, self.folder = name, workspace, model, folder
        self.observer = observer or Observer()
        self.config = model.config

    @property
    def rows(self) -> ClientRows:
        """The client's rows."""
        return self.workspace.clients[self.name]

    @cached_property
    def examples(self) -> list[Example]:
        """Its train rows, encoded."""
        return self.workspace.encoder.encode_all(self.rows.train)

    @property
    def state_file(self) -> Path:
        """Where its personal state lies."""
        return self.folder / "personal" / f"{self.name}.safetensors"

    def join(self) -> tuple[Vector, list[dict[str, Any]]]:
        """Select the experts to graft, and return the initial shared weights and the split's table."""
        state = self._state()
        with self.model.lend(*state[:2]) as split:
            return encode_shared(split), split.describe()

    def describe(self, table: list[dict[str, Any]]) -> dict[str, str | int]:
        """Return what the server may know of this client: names, sizes and hashes, no rows and no weights."""
        return {
            "client": self.name,
            "base": self.model.base.fingerprint,
            "manifest": self.model.manifest.to_json(),
            "adapter": self.model.adapter_config(),
            "split": json.dumps(table),
            "train_rows": len(self.rows.train),
            "test_rows": len(self.rows.test),
        }

    def train(self, vector: Vector, round_number: int) -> Trained:
        """Train one round from the given shared weights; the personal part is kept on disk.

        Args:
            vector: The round's shared weights, flat.
            round_number: From 1.
        """
        grafts, personal, meta = self._state()
        settings = self._local_settings(round_number)
        stream = generator(self.config.seed, self.name, round_number, "batches")
        with self.model.lend(grafts, personal) as split, torch.random.fork_rng(devices=[]):
            load_vector(vector, split.shared)
            torch.manual_seed(stream.initial_seed())  # dropout draws from the global stream
            result = self.model.method.train(
                self.model.model, split, self.examples, settings, stream, self._progress(round_number, settings.steps)
            )
            kept = PersonalMeta(
                self.name, meta.base, round_number, vector_hash(vector), meta.choice, meta.selection
            )
            save_personal(self.state_file, split.personal, kept)
            metrics = {"loss": result.loss, "steps": result.steps, "tokens": result.tokens}
            return Trained(Update(self.name, encode_shared(split), result.rows, metrics), split)

    def evaluate(self, vector: Vector, states: Sequence[State]) -> dict[State, Scores]:
        """Score model states on the client's own test rows; answers stay in the client's folder.

        Args:
            vector: The shared weights.
            states: Which of zero_shot, global, personalized.
        """
        rows = self.rows.test[: self.config.evaluation.rows]
        grafts, personal, _ = self._state()
        with self.model.lend(grafts, personal) as split:
            load_vector(vector, split.shared)
            scores = {state: self._score(state, rows, grafts) for state in states}
        self._write_predictions(rows, scores)
        return scores

    def _score(self, state: State, rows: Sequence[Row], grafts: Grafts | None) -> Scores:
        """Score one state of the model that is lent now."""
        if state == "zero_shot":
            if self.name not in self.workspace.zero_shot:
                with self._bare(grafts):
                    self.workspace.zero_shot[self.name] = self._run_evaluation(state, rows)
            return self.workspace.zero_shot[self.name]
        if state == "global" and grafts is not None:
            with grafts.disabled():
                return self._run_evaluation(state, rows)
        return self._run_evaluation(state, rows)

    def _bare(self, grafts: Grafts | None) -> ExitStack:
        """Compute as the untouched base does: without LoRA and without grafts."""
        stack = ExitStack()
        stack.enter_context(self.model.model.disable_adapter())
        if grafts is not None:
            stack.enter_context(grafts.disabled())
        return stack

    def _run_evaluation(self, state: State, rows: Sequence[Row]) -> Scores:
        settings = self.config.evaluation
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            self.observer.progress(f"{self.name}: {state} answers", done, len(rows))

        wanted = EvaluationSettings(settings.max_new_tokens, settings.batch_size, self.config.model.precision)
        return evaluate(self.model.model, self.workspace.encoder, rows, wanted, report)

    def _state(self) -> tuple[Grafts | None, dict[str, Tensor], PersonalMeta]:
        """Return the client's grafts, stored personal tensors and their meta, selecting experts on first call."""
        fingerprint = self.model.base.fingerprint
        if self.state_file.exists():
            personal, meta = load_personal(self.state_file, base=fingerprint)
        else:
            personal, meta = {}, self._first_meta(fingerprint)
            save_personal(self.state_file, {}, meta)
        grafts = self.model.grafts(self.name, meta.choice) if self.model.method.grafts else None
        return grafts, personal, meta

    def _first_meta(self, fingerprint: str) -> PersonalMeta:
        choice, selection = self._select() if self.model.method.grafts else ({}, {})
        return PersonalMeta(self.name, fingerprint, 0, "", choice, selection)

    def _select(self) -> tuple[dict[str, tuple[int, ...]], dict[str, list[float]]]:
        """Pick the experts to graft on the client's own train rows, with the base as it was pretrained."""
        settings = self.config.graft
        stream = generator(self.config.seed, self.name, "calibration")
        order = torch.randperm(len(self.examples), generator=stream).tolist()[: settings.calibration_rows]
        examples = sorted((self.examples[i] for i in order), key=lambda e: len(e.input_ids))
        size, pad = self.config.evaluation.batch_size, self.workspace.encoder.tokenizer.pad_token_id
        padded = (pad_batch(examples[s : s + size], pad) for s in range(0, len(examples), size))
        with self.model.model.disable_adapter(), autocast(self.model.device, self.config.model.precision):
            layers = reconstruction_scores(
                self._forward,
                self.model.experts,
                [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in padded],
                max_tokens=settings.calibration_tokens,
                generator=stream,
            )
        choice = {layer.name: layer.best(settings.experts) for layer in layers}
        self.observer.chosen(self.name, choice)
        return choice, {layer.name: layer.relative.tolist() for layer in layers}

    def _forward(self, batch: Batch) -> object:
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return self.model.model.get_base_model().base_model(**inputs, use_cache=False)

    def _local_settings(self, round_number: int) -> LocalSettings:
        training, rounds = self.config.training, self.config.federation.rounds
        steps = steps_per_round(
            len(self.examples), training.batch_size, training.local_steps, training.local_epochs
        )
        return LocalSettings(
            steps=steps,
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size or training.batch_size,
            lr=training.lr,
            personal_lr=training.personal_lr or training.lr,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            first_step=(round_number - 1) * steps,
            total_steps=rounds * steps,
            warmup_steps=round(training.warmup_ratio * rounds * steps),
            precision=self.config.model.precision,
            pad_token_id=self.workspace.encoder.tokenizer.pad_token_id,
        )

    def _progress(self, round_number: int, steps: int) -> Callable[[float], None]:
        done = 0

        def report(loss: float) -> None:
            nonlocal done
            done += 1
            self.observer.progress(f"{self.name}: round {round_number}, loss {loss:.3f}", done, steps)

        return report

    def _write_predictions(self, rows: Sequence[Row], scores: dict[State, Scores]) -> None:
        lines = [
            json.dumps(
                {"instruction": row.instruction, "context": row.context, "response": row.response}
                | {state: score.predictions[index] for state, score in scores.items()}
            )
            for index, row in enumerate(rows)
        ]
        write_text(self.folder / "predictions" / f"{self.name}.jsonl", "\n".join(lines) + "\n")
