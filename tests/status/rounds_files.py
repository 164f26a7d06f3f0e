"""Rounds as a server writes them, by hand."""

from __future__ import annotations

from typing import Any

from flexperts.server.round_log import RoundLog

RECIPE = "[data.silos]\n[federation]\nrounds = 3\n"


def log(number: int, used: dict[str, float | None], **more: Any) -> dict[str, Any]:
    """Return the record of a round in which some silos are used, each with its loss."""
    facts: dict[str, Any] = {
        "clients": {name: {"loss": loss, "rows": 4} for name, loss in used.items()},
        "uplink": dict.fromkeys(used, 1000),
        "downlink": dict.fromkeys(used, 500),
        "seconds": {"training": 60.0, "evaluation": 4.0},
        "participants": [*used],
        "planned": 3,
    }
    return vars(RoundLog(number, **facts | more))
