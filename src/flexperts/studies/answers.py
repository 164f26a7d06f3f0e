"""How many of an entry's answers were cut at the limit, and how many references are longer than it."""

from __future__ import annotations

from typing import Any

from flexperts.studies.finished import Finished


def answers(entry: Finished) -> dict[str, Any] | None:
    """Return the limits in tokens, and for each client the counts over all seeds; None of runs that did not count.

    A client has ``rows`` (scored, over all seeds), ``longer_references`` and ``cut`` by state.
    """
    seeds = [{client: summary["clients"][client] for client in entry.clients} for summary in entry.summaries]
    told = [client.get("answers") for seed in seeds for client in seed.values()]
    if not all(told):
        return None
    return {
        "max_new_tokens": sorted({its["max_new_tokens"] for its in told}),
        "clients": {c: _client([seed[c] for seed in seeds], entry.states) for c in entry.clients},
    }


def _client(seeds: list[dict[str, Any]], states: tuple[str, ...]) -> dict[str, Any]:
    return {
        "rows": sum(seed["scored_rows"] for seed in seeds),
        "longer_references": sum(seed["answers"]["longer_references"] for seed in seeds),
        "cut": {state: sum(seed["answers"]["cut"][state] for seed in seeds) for state in states},
    }
