"""Data that a process shares between runs and clients: the base, the rows, and the untouched base's scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from flexperts.client.floor import check_floor
from flexperts.config.data import LossOn
from flexperts.config.run import RunConfig
from flexperts.data.bad_rows import BadRow, settle_bad_rows, some
from flexperts.data.batches import pad_batch
from flexperts.data.check import SIDES, Lengths, Side, lengths_of
from flexperts.data.clients import Clients, Refused, each, load_clients, raised
from flexperts.data.prompts import Example, PromptEncoder, encoder_of
from flexperts.data.records import Say
from flexperts.data.rows import ClientRows, Row
from flexperts.data.tables import Given
from flexperts.errors import DataError, GraftError, ModelError
from flexperts.evaluation.mmlu import KnowledgeScore
from flexperts.evaluation.scores import EvaluationSettings, Scores
from flexperts.modeling.cards import check_cards
from flexperts.modeling.forward import Precision, autocast, token_losses
from flexperts.modeling.load import LoadedBase, load_base, load_tokenizer
from flexperts.modeling.routing import LayerRouting
from flexperts.moe.attention import attention_linears
from flexperts.moe.experts import find_experts
from flexperts.moe.router import expert_rows
from flexperts.observer import current_observer
from flexperts.selection.rules import pick_layers

CLIENTS_KEPT = 64
"""Clients whose encoded rows stay in memory between turns; encoded rows are many times larger than their text."""


@dataclass
class Untouched:
    """What is known of the untouched base, which no method changes: every value is computed once.

    Args:
        finite: Precisions in which its loss on a train row is finite.
        scores: (hash of the rows, how they are encoded, settings) -> its scores.
        routing: (precision, hash of the batches) -> its routing by experts module: T N values per layer.
        mmlu: The recipe's source, questions and shots -> its score; None where its logits are not finite.
    """

    finite: set[Precision] = field(default_factory=set)
    scores: dict[tuple[str, tuple[int, LossOn, str], EvaluationSettings], Scores] = field(default_factory=dict)
    routing: dict[tuple[Precision, str], dict[str, LayerRouting]] = field(default_factory=dict)
    mmlu: dict[tuple[str, int | None, int], KnowledgeScore | None] = field(default_factory=dict)


@dataclass
class Workspace:
    """Base, rows and encoder of a run, loaded once and shared with its reference run.

    Args:
        config: The run; only the reference's method may differ.
        loaded: The base, if it is in memory already.
        untouched: What is known of the untouched base.
        started_with: Called when rows are read; refuses rows that are not those that the run started with.
        refused: See ``load_clients``; it also gets errors of rows that cannot be encoded.
        given: Rows that a Python program has given, by their source in the recipe.
    """

    config: RunConfig
    loaded: LoadedBase | None = None
    untouched: Untouched = field(default_factory=Untouched)
    started_with: Callable[[Clients], None] | None = None
    refused: Refused = raised
    given: Given = field(default_factory=dict, repr=False)
    lengths: dict[str, dict[Side, Lengths]] = field(default_factory=dict, init=False, repr=False)
    """Lengths of every client's rows, split by split, once ``clients`` is read."""
    _encoded: dict[str, list[Example]] = field(default_factory=dict, init=False, repr=False)
    _encoders: dict[str, PromptEncoder] = field(default_factory=dict, init=False, repr=False)
    _longest_response: int = field(default=0, init=False, repr=False)
    _longest_prompt: int = field(default=0, init=False, repr=False)

    def for_run(self, config: RunConfig) -> Workspace:
        """Return the workspace of another run: this one, or a new one if the rows or the base differ."""
        if config.model != self.config.model:
            return Workspace(config, given=self.given)
        if _rows_of(config) == _rows_of(self.config):
            return self
        base = self.__dict__.get("base", self.loaded)  # the base if it is in memory; it is not loaded for this
        return Workspace(config, base, self.untouched, given=self.given)

    def rows_only(self) -> Workspace:
        """Return a workspace with the same rows for another process, which loads the base itself."""
        other = Workspace(self.config.with_choices(template_date=self.template_date))
        other.__dict__["clients"] = self.clients
        other.lengths = self.lengths
        other._longest_response, other._longest_prompt = self._longest_response, self._longest_prompt
        return other

    def with_clients(self, config: RunConfig, clients: Clients) -> Workspace:
        """Return a workspace on the same base in which clients have these rows; all of them can be encoded."""
        other = Workspace(config, self.base, self.untouched, given=self.given)
        other.__dict__["clients"] = clients
        other.lengths = self.lengths
        return other

    @cached_property
    def clients(self) -> Clients:
        """Every client's rows; all of them can be encoded."""
        say = current_observer().notice
        read = load_clients(self.config.data, self.config.seed, say, self.refused, self.given)
        for line in dict.fromkeys(line for encoder in self.encoders for line in encoder.notices):
            say(line)
        clients = each(read, lambda name, rows: self._fitting(name, rows, say), self.refused)
        if self.started_with is not None:
            self.started_with(clients)
        return clients

    def _fitting(self, name: str, rows: ClientRows, say: Say) -> ClientRows:
        """Return a client's rows that can be encoded; the others are skipped or refused as the recipe says."""
        bad: list[BadRow] = []
        encoder = self.encoder_for(name)
        train, test, validation = (self._encodable(encoder, getattr(rows, side), bad) for side in SIDES)
        for _, example in train:
            self._longest_response = max(self._longest_response, example.response_length)
        for _, example in (*test, *validation):
            self._longest_prompt = max(self._longest_prompt, example.prompt_length)
        if len(self._encoded) < CLIENTS_KEPT:
            self._encoded[name] = [example for _, example in train]
        sides = dict(zip(SIDES, (train, test, validation), strict=True))
        self.lengths[name] = {side: lengths_of([example for _, example in its]) for side, its in sides.items()}
        fitting = ClientRows(*(tuple(row for row, _ in its) for its in sides.values()))
        is_empty = any(getattr(rows, side) and not its for side, its in vars(fitting).items())
        total = len(rows.train) + len(rows.test) + len(rows.validation)
        on_bad_row = self.config.data.of_client(name).on_bad_row
        settle_bad_rows(name, bad, len(bad) if is_empty else total, on_bad_row, say)
        self._say_cut(name, [row for row, example in (*train, *test, *validation) if example.cut], say)
        answers = sum(turn.role == "assistant" and turn.trained for row in fitting.train for turn in row.before)
        if answers and self.encoder_for(name).chat is None and self.config.data.loss_on == "all":
            say(f"{name}: the alpaca template has one answer: {answers} earlier answers of chats are not trained")
        return fitting

    def _say_cut(self, name: str, cut: Sequence[Row], say: Say) -> None:
        to = f"training.max_length = {self.config.training.max_length} tokens"
        if chats := [row.where for row in cut if row.before]:
            say(f"{name}: {len(chats)} chats lose their oldest turns to fit {to}: {some(chats)}")
        if texts := [row.where for row in cut if row.plain]:
            say(f"{name}: {len(texts)} texts are cut to {to}: {some(texts)}")
        if contexts := [row.where for row in cut if not (row.before or row.plain)]:
            say(f"{name}: {len(contexts)} contexts are cut to {to}: {some(contexts)}")

    def _encodable(
        self, encoder: PromptEncoder, rows: Sequence[Row], bad: list[BadRow]
    ) -> list[tuple[Row, Example]]:
        """Return the rows that can be encoded, with their encodings; add the others to ``bad``."""
        found = []
        for row in rows:
            if encoder.pairs and not row.rejected:
                rule = "training.objective = 'dpo' compares two answers to each question"
                bad.append(BadRow(row.where, "no rejected answer", rule))
                continue
            try:
                found.append((row, encoder.encode(row)))
            except DataError as error:
                what = f"{error.value.removeprefix(f'{row.where}: ')} ({error.rule})"
                bad.append(BadRow(row.where, what, "such a row cannot be encoded"))
        return found

    @cached_property
    def base(self) -> LoadedBase:
        """The resident base."""
        return self.loaded or load_base(self.config.model, self.encoder.tokenizer)

    def examples(self, client: str) -> list[Example]:
        """Return a client's encoded train rows; those of the last ``CLIENTS_KEPT`` clients are cached."""
        rows = self.clients[client].train
        found = self._encoded.pop(client, None) or self.encoder_for(client).encode_all(rows)
        while len(self._encoded) >= CLIENTS_KEPT:
            self._encoded.pop(next(iter(self._encoded)))
        self._encoded[client] = found
        return found

    @property
    def longest_response(self) -> int:
        """Tokens of the longest train response, with its end token, of all clients in this process."""
        return self._longest_response if self.clients else 0

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that may be scored, of all clients in this process."""
        return self._longest_prompt if self.clients else 0

    def check(self, config: RunConfig, *, needs_experts: bool) -> None:
        """Refuse settings that would otherwise fail in the middle of a run.

        Args:
            config: The run; settings that decide neither rows nor base may differ from the workspace's.
            needs_experts: Whether a method of the run works on experts.
        """
        check_floor(config, self.clients)
        check_cards(self.base.model, config)
        attention_linears(self.base.model, config.lora.projections)
        self._check_loss(config)
        wanted, found = config.graft.experts, find_experts(self.base.model) if needs_experts else []
        grafted = pick_layers(found, config.graft.layers if found else ())
        for experts in grafted if config.graft.gate_start == "router" else ():
            expert_rows(self.base.model, experts, ())
        for experts in found:
            if wanted > experts.num_experts:
                raise GraftError(
                    f"graft.experts = {wanted}", f"{experts.name} has {experts.num_experts}", "lower it"
                )

    def _check_loss(self, config: RunConfig) -> None:
        """Refuse a base whose untouched loss on one row is not finite; tested once per base."""
        device, precision = next(self.base.model.parameters()).device, config.model.precision
        if precision in self.untouched.finite:
            return
        batch = pad_batch(self.examples(next(iter(self.clients)))[:1], self.encoder.tokenizer.pad_token_id)
        with torch.no_grad(), autocast(device, precision):
            loss = float(token_losses(self.base.model, batch)[0])
        if not math.isfinite(loss):
            raise ModelError(
                f"model.base = {config.model.base!r}: the untouched base's loss is {loss} on a train row",
                "it must be a finite number",
                "use other weights, or another model.dtype or model.precision",
            )
        self.untouched.finite.add(precision)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder of training, selection, evaluation and chat, by the run's template; it needs no weights."""
        return encoder_of(self.config, *self._tokenizer)

    @cached_property
    def _tokenizer(self) -> tuple[Any, Any]:
        """The tokenizer, and transformers' configuration of the base."""
        loaded = self.loaded
        return (loaded.tokenizer, loaded.model.config) if loaded else load_tokenizer(self.config.model)

    def encoder_for(self, client: str) -> PromptEncoder:
        """Return a client's encoder: the run's, unless the client has a template of its own."""
        template = self.config.data.own_of(client).get("template", self.config.model.template)
        if template == self.config.model.template:
            return self.encoder
        if template not in self._encoders:
            config = self.config.with_choices(template_date=self.encoder.date)
            model = config.model.model_copy(update={"template": template})
            self._encoders[template] = encoder_of(config.model_copy(update={"model": model}), *self._tokenizer)
        return self._encoders[template]

    @property
    def encoders(self) -> list[PromptEncoder]:
        """All encoders of the run: the one by its template, and one per other template of a client."""
        return list(dict.fromkeys([self.encoder, *map(self.encoder_for, self.config.data.clients)]))

    @property
    def template_date(self) -> str | None:
        """The date (ISO) that chat templates get; None where none asks for one."""
        return next((encoder.date for encoder in self.encoders if encoder.date), None)


def _rows_of(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings that decide which rows a run has, and how they are encoded."""
    return config.seed, config.data, config.training.max_length, config.training.objective


class TrainRows(Sequence[Example]):
    """A client's train rows, encoded on first access: a model that is only used needs none.

    Args:
        read: Returns the encoded rows.
    """

    def __init__(self, read: Callable[[], Sequence[Example]]) -> None:
        self._read = read

    @cached_property
    def _rows(self) -> Sequence[Example]:
        return self._read()

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)
