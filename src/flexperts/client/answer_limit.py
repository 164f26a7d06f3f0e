"""The longest answer in tokens, and the references that are longer than it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexperts.client.workspace import Workspace
from flexperts.config.evaluation import EvaluationConfig
from flexperts.config.run import RunConfig
from flexperts.data.prompts import PromptEncoder
from flexperts.data.rows import ClientRows, Row
from flexperts.errors import ConfigError
from flexperts.observer import Observer

_NAMED = 10
"""At most so many clients are named in one line."""


def answer_limit(workspace: Workspace, config: RunConfig) -> int:
    """Return the longest answer in tokens: the recipe's limit, or one chosen from the train rows in this process.

    All clients of one process share a limit; a silo on its own machine chooses from its own rows. A chosen limit,
    together with the longest prompt, fits the positions that the base can read.
    """
    if (given := config.evaluation.max_new_tokens) is not None:
        return given
    most, positions = config.training.max_length, workspace.encoder.positions
    if positions is not None:
        most = min(most, positions - workspace.longest_prompt)
    return chosen_limit(workspace.longest_response, most)


def chosen_limit(longest: int, most: int) -> int:
    """Return the smallest power of two that holds a response of ``longest`` tokens, but no more than ``most``."""
    return int(min(1 << (longest - 1).bit_length(), most))


def with_recorded_limit(config: RunConfig, summary: Mapping[str, Any]) -> RunConfig:
    """Return a finished run's recipe with the answer limit that its summary records, if the recipe set none."""
    noted = [client["answers"]["max_new_tokens"] for client in summary["clients"].values() if client.get("answers")]
    return config.with_choices(max_new_tokens=max(noted, default=None))


def scored_rows(rows: ClientRows, evaluation: EvaluationConfig) -> tuple[Row, ...]:
    """Return the rows of a client that evaluation scores."""
    return (rows.validation if evaluation.split == "validation" else rows.test)[: evaluation.rows]


def longer_references(workspace: Workspace, config: RunConfig, client: str, limit: int) -> list[int]:
    """Return the tokens, without end tokens, of a client's scored references that are longer than ``limit``."""
    scored = workspace.lengths[client][config.evaluation.split].answers[: config.evaluation.rows]
    return [tokens for tokens in scored if tokens > limit]


def check_limit(workspace: Workspace, config: RunConfig, observer: Observer) -> None:
    """Report the limit if the recipe sets none, and the clients with longer scored references."""
    limit, found = answer_limit(workspace, config), []
    if config.evaluation.max_new_tokens is None:
        longest = workspace.longest_response
        observer.stage(f"answers of up to {limit} tokens: the longest train response has {longest} with its end")
    most = workspace.encoder.positions
    for name, rows in workspace.clients.items():
        scored = scored_rows(rows, config.evaluation)
        if most is not None and workspace.longest_prompt + limit > most:
            _check_room(name, scored, workspace.encoder_for(name), limit, most)
        if longer := longer_references(workspace, config, name, limit):
            found.append(f"{name} {len(longer)} of {len(scored)} (up to {max(longer)} tokens)")
    if found:
        more = f" and {len(found) - _NAMED} more clients" if len(found) > _NAMED else ""
        observer.notice(
            f"with evaluation.max_new_tokens = {limit}, answers are shorter than these references: "
            f"{', '.join(found[:_NAMED])}{more}; raise it to allow answers of their length"
        )


def _check_room(name: str, scored: Sequence[Row], encoder: PromptEncoder, limit: int, most: int) -> None:
    for row in scored:
        if (prompt := encoder.encode(row).prompt_length) + limit > most:
            raise ConfigError(
                f"{name}: {row.where}: a prompt of {prompt} tokens, and an answer of up to {limit}",
                f"the base reads at most {most} tokens",
                "lower evaluation.max_new_tokens or training.max_length",
            )
