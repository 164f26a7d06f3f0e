"""One client: it joins, trains a round, evaluates. Nothing here knows Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexperts.artifacts import write_text
from flexperts.communication.messages import Update, encode_shared
from flexperts.data.prompts import Example
from flexperts.data.rows import ClientRows, Row
from flexperts.evaluation.scores import EvaluationSettings, Scores, evaluate
from flexperts.federation.client_model import ClientModel
from flexperts.federation.observer import Observer
from flexperts.federation.workspace import Workspace
from flexperts.grafting.calibration import CalibrationSettings, score_experts
from flexperts.grafting.grafts import Grafts
from flexperts.methods.base import State
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
        self,
        name: str,
        workspace: Workspace,
        model: ClientModel,
        folder: Path,
        observer: Observer | None = None,
    ) -> None:
        self.name, self.workspace, self.model, self.folder = name, workspace, model, folder
        self.observer = observer or Observer()
        self.config = model.config

    @property
    def rows(self) -> ClientRows:
        """The client's rows."""
        return self.workspace.clients[self.name]

    @property
    def examples(self) -> list[Example]:
        """Its train rows, encoded."""
        return self.workspace.examples[self.name]

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
        count = self._counter(f"{self.name}: round {round_number}", settings.steps)
        with self.model.lend(grafts, personal) as split, torch.random.fork_rng(devices=[]):
            load_vector(vector, split.shared)
            torch.manual_seed(stream.initial_seed())  # dropout draws from the global stream
            result = self.model.method.train(
                self.model.model, split, self.examples, settings, stream, lambda loss: count(1)
            )
            kept = PersonalMeta(
                self.name, meta.base, round_number, vector_hash(vector), meta.choice, meta.selection
            )
            save_personal(self.state_file, split.personal, kept)
            metrics = {"loss": result.loss, "steps": result.steps, "tokens": result.tokens}
            return Trained(Update(self.name, encode_shared(split), result.rows, metrics), split)

    def evaluate(self, vector: Vector, states: Sequence[State]) -> dict[State, Scores]:
        """Score model states on the client's own test rows.

        Args:
            vector: The shared weights.
            states: Which of zero_shot, global, personalized.
        """
        return {state: self._score(vector, state) for state in states}

    @contextmanager
    def in_state(self, vector: Vector, state: State) -> Iterator[Any]:
        """Yield the model as this client uses it in a state, inside the block.

        Args:
            vector: The shared weights.
            state: zero_shot is the untouched base, global the shared weights alone, personalized all.
        """
        grafts, personal, _ = self._state()
        with self.model.lend(grafts, personal) as split, ExitStack() as stack:
            load_vector(vector, split.shared)
            if state == "zero_shot":
                stack.enter_context(self.model.model.disable_adapter())
            if state != "personalized" and grafts is not None:
                stack.enter_context(grafts.disabled())
            yield self.model.model

    def write_predictions(self, scores: Mapping[State, Scores]) -> None:
        """Keep the generated answers beside the rows, in the client's own folder."""
        lines = [
            json.dumps(
                {"instruction": row.instruction, "context": row.context, "response": row.response}
                | {state: score.predictions[index] for state, score in scores.items()}
            )
            for index, row in enumerate(self._test_rows)
        ]
        write_text(self.folder / "predictions" / f"{self.name}.jsonl", "\n".join(lines) + "\n")

    @property
    def _test_rows(self) -> tuple[Row, ...]:
        return self.rows.test[: self.config.evaluation.rows]

    def _score(self, vector: Vector, state: State) -> Scores:
        """Score one state; the untouched base is scored once per workspace."""
        known = self.workspace.zero_shot.get(self.name) if state == "zero_shot" else None
        if known is not None:
            return known
        settings = self.config.evaluation
        wanted = EvaluationSettings(settings.max_new_tokens, settings.batch_size, self.config.model.precision)
        report = self._counter(f"{self.name}: {state} answers", len(self._test_rows))
        with self.in_state(vector, state) as model:
            scores = evaluate(model, self.workspace.encoder, self._test_rows, wanted, report)
        if state == "zero_shot":
            self.workspace.zero_shot[self.name] = scores
        return scores

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
        graft = self.config.graft
        settings = CalibrationSettings(
            rows=graft.calibration_rows,
            tokens=graft.calibration_tokens,
            batch_size=self.config.training.micro_batch_size or self.config.training.batch_size,
            pad_token_id=self.workspace.encoder.tokenizer.pad_token_id,
            precision=self.config.model.precision,
        )
        stream = generator(self.config.seed, self.name, "calibration")
        with self.model.model.disable_adapter():
            layers = score_experts(self.model.base.model, self.model.experts, self.examples, settings, stream)
        choice = {layer.name: layer.best(graft.experts) for layer in layers}
        self.observer.chosen(self.name, choice)
        return choice, {layer.name: layer.relative.tolist() for layer in layers}

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

    def _counter(self, task: str, total: int) -> Callable[[int], None]:
        """Return a function that adds to the progress of a task."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            self.observer.progress(task, done, total)

        return add
