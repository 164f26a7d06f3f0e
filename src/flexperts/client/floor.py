"""The floor of a run: at its end each client keeps the simplest of its models that is about as good as its best.

    D(c) = sum_i w_i d_i(c)      SE(c)^2 = n / (n - 1) sum_i w_i^2 (d_i(c) - D(c))^2      w_i = t_i / sum_j t_j

over n validation rows with t_i response tokens; d_i(c) is the NLL of candidate c on row i minus that of the best
candidate, which has the lowest NLL of all rows. With ``training.objective = "dpo"`` it is DPO's loss, and t_i is 1.
The client keeps the first c in the order of ``CANDIDATES`` with D(c) <= SE(c): the one-standard-error rule of
Breiman et al. (1984), with the error of the paired difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexperts.config.run import RunConfig
from flexperts.data.clients import Clients
from flexperts.errors import DataError
from flexperts.evaluation.scores import Scores, finite_or_none
from flexperts.files import holding, make_folder, opened, read_json
from flexperts.methods.kit.candidates import CANDIDATES

_FEWEST = 8
"""Fewest validation rows: with fewer, the standard error itself is too uncertain to decide by."""


def choose(nlls: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> str:
    """Return the candidate to keep; zero_shot if no candidate has finite scores.

    Args:
        nlls: Candidate -> loss of every row, such as its NLL; one that is not finite excludes the candidate.
        tokens: Weight of every row, such as its response tokens; at least two rows.
    """
    finite = {name: np.array(nlls[name]) for name in CANDIDATES if name in nlls and np.isfinite(nlls[name]).all()}
    weights = np.array(tokens) / sum(tokens)
    # Of equal ones, the first.
    best = min(finite, key=lambda name: float(weights @ finite[name]), default="zero_shot")
    for name, each in finite.items():
        difference = each - finite[best]
        mean, n = float(weights @ difference), len(weights)
        error = np.sqrt(n / (n - 1) * np.sum((weights * (difference - mean)) ** 2))
        if mean <= error:
            return name
    return best


def record_of(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return scores of candidates on the same rows as plain values.

    Returns:
        ``nll``: means; ``rows`` and ``tokens``: every row's NLL, and its weight. On preference rows these are DPO's
        loss, of which ``dpo`` has the means, and 1.
    """
    first = next(iter(scores.values()))
    return {
        "nll": {name: its.nll for name, its in scores.items()},
        "rows": {name: [finite_or_none(loss) for loss in its.losses] for name, its in scores.items()},
        "tokens": list(first.weights),
        **({"dpo": {name: its.loss for name, its in scores.items()}} if first.margins else {}),
    }


@contextmanager
def deciding(
    path: Path, of: Mapping[str, Any], patience: float, waiting: Callable[[str], None]
) -> Iterator[dict[str, Any] | None]:
    """Yield the record of a client's choice if there is one for this model, else None, in a block of one process.

    Args:
        path: The client's file.
        of: What the record must say of the model that it is about, as far as its version says it.
        patience: Seconds to wait for another process that decides it now.
        waiting: Receives a line that names this other process.
    """
    if (record := _read(path, of)) is not None:
        yield record
        return
    make_folder(path.parent)
    with holding(path.with_suffix(".lock"), path, patience=patience, waiting=waiting):
        yield _read(path, of)


def _read(path: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    record = opened(path, read_json(path), needed=True) if path.exists() else None
    return record if record and of.items() <= {**of, **record}.items() else None


def check_floor(config: RunConfig, clients: Clients) -> None:
    """Refuse clients with too few validation rows to choose by."""
    few = {name: len(its.validation) for name, its in clients.items() if len(its.validation) < _FEWEST}
    if config.floor and few:
        name, count = next(iter(few.items()))
        more = f" (and {len(few) - 1} more clients)" if len(few) > 1 else ""
        raise DataError(
            f"{name}: {count} validation rows{more}",
            f"[floor] needs at least {_FEWEST} of each client",
            "raise data.validation_rows, add rows, leave this client out, or leave [floor] out",
        )
