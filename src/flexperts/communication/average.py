"""Averaging payloads as they arrive: one running sum, not N replies in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flexperts.communication.messages import Update
from flexperts.errors import FederationError, incompatible
from flexperts.parameters.vector import Vector


def weighted_mean(updates: Iterable[Update]) -> Vector:
    """Return sum_i (n_i / n) theta_i in fp32, n_i being a client's train rows.

    The result depends on the order of the sum in its last bits, so updates must come sorted by client; the caller's
    grid yields them so. Source: McMahan et al., 2017 (FedAvg).
    """
    total: Vector | None = None
    rows, last = 0, ""
    for update in updates:
        _check_turn(update, last)
        if total is None:
            total = update.vector * np.float32(update.rows)
        elif update.vector.shape == total.shape:
            _add_weighted(total, update)
        else:
            raise incompatible(f"{update.client} sent {update.vector.size} values", f"others sent {total.size}")
        rows, last = rows + update.rows, update.client
        del update  # before the next one arrives
    if total is None:
        raise FederationError("no update arrived", "a round needs at least one", "check that the silos are up")
    if not np.isfinite(total).all():
        raise FederationError("the mean of the updates", "its values must be finite", "lower training.lr")
    return np.divide(total, np.float32(rows), out=total)


def _add_weighted(total: Vector, update: Update) -> None:
    """Add an update times its rows in place, reading both once.

    The product is rounded before it is added, as in two separate operations; a fused one only multiplies by 1.
    """
    torch.from_numpy(total).addcmul_(_as_tensor(update.vector), torch.ones(()), value=update.rows)


def _as_tensor(vector: Vector) -> Tensor:
    """Return a vector as a tensor for reading, without torch's warning that its memory is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vector)


def capped(weights: Sequence[float], share: float) -> list[float]:
    """Return weights of a mean with the largest ones lowered, so that none is more than a share of their sum.

    With n weights the share is at least 1/n. Fewer than three weights are returned as they are: of two, neither can
    be called too large.

    Args:
        weights: Not negative, such as rows; whole numbers stay whole and are rounded down.
        share: The largest share, above 0 and at most 1.
    """
    ordered = sorted(weights, reverse=True)
    if len(ordered) < 3 or ordered[0] <= (share := max(share, 1 / len(ordered))) * sum(ordered):
        return list(weights)
    for count, largest in enumerate(ordered):  # the first ``count`` are lowered to one value, the others stay
        most = share * sum(ordered[count:]) / (1 - count * share)
        # Where one more share is all, the largest of the rest is at most the rest; only rounding can deny it.
        if largest <= most or (count + 1) * share > 1 - 1e-9:
            break
    most = max(most, ordered[-1])  # rounding must not lower the smallest
    return [weight if weight <= most else type(weight)(most) for weight in weights]


def capped_rows(rows: Mapping[str, int], share: float) -> dict[str, int]:
    """Return what ``capped`` makes of clients' rows."""
    return dict(zip(rows, map(int, capped(list(rows.values()), share)), strict=True))


def holders_mean(current: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return every tensor's mean over the clients that sent it, by rows; one that no client sent is unchanged.

    For methods whose clients hold different parts: a tensor sent by one client is copied, by several averaged.

    Args:
        current: The tensors before the round.
        updates: Sorted by client; each may hold any subset of ``current``'s names.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for update in checked(updates):
        for name, tensor in update.tensors().items():
            if name not in current or tensor.shape != current[name].shape:
                raise incompatible(f"{update.client} sent {name}", "no such tensor is shared")
            sums[name] = sums[name] + tensor * update.rows if name in sums else tensor * update.rows
            rows[name] = rows.get(name, 0) + update.rows
    return {n: sums[n] / rows[n] if n in sums else t for n, t in current.items()}


def checked(updates: Iterable[Update]) -> Iterator[Update]:
    """Yield updates one by one, for rules that combine them in another way than by a mean."""
    last = ""
    for update in updates:
        _check_turn(update, last)
        check_finite(update)
        last = update.client
        yield update
    if not last:
        raise FederationError("no update arrived", "a round needs at least one", "check that the silos are up")


def _check_turn(update: Update, last: str) -> None:
    if update.client <= last:
        raise FederationError(f"{update.client} after {last}", "updates must be sorted by client", "sort them")
    if update.rows < 1:
        check_finite(update)


def check_finite(update: Update) -> None:
    """Refuse an update that cannot be used: without rows, or with values that are not finite."""
    if update.rows < 1 or not np.isfinite(update.vector).all():
        raise FederationError(
            f"{update.client}: {update.rows} rows, {(~np.isfinite(update.vector)).sum()} values not finite",
            "an update must have finite weights and at least one row",
            "lower training.lr on that silo",
        )
