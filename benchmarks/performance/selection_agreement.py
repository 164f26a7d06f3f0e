"""How many tokens a choice of experts needs: choices from a share of the tokens against those from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from selection_workload import Workload
from torch import Generator, Tensor

from flexperts.data.batches import pad_batch
from flexperts.data.prompts import Example
from flexperts.moe.layout import LayerExperts, Note

DRAWS = 4


@dataclass(frozen=True)
class TokenErrors:
    """One client's errors, token by token.

    Args:
        row: Row of each token, ``[T]``.
        errors: ||F - E_s||^2, ``[L, T, N]`` of L layers.
    """

    row: Tensor
    errors: Tensor

    def of_rows(self, count: int, stream: Generator) -> Tensor:
        """Return the errors of some rows, drawn at random."""
        rows = torch.randperm(int(self.row.max()) + 1, generator=stream)[:count]
        return self.errors[:, torch.isin(self.row, rows)]


def token_errors(workload: Workload, examples: Sequence[Example]) -> TokenErrors:
    """Run the base once, and keep every token's error with every expert of every layer."""
    found: dict[str, list[Tensor]] = {experts.name: [] for experts in workload.experts}
    rows, keep = [], torch.empty(0, dtype=torch.bool)

    def into(experts: LayerExperts) -> Note:
        def note(hidden: Tensor, _index: Tensor, _weights: Tensor, target: Tensor) -> None:
            outputs = experts.run_all(hidden[keep])
            errors = [(target[keep].float() - some.float()).square().sum(-1) for some in outputs]
            found[experts.name].append(torch.cat(errors).T)

        return note

    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    handles = [handle for e in workload.experts for handle in e.watch(into(e))]
    for start in range(0, len(order), 8):
        chosen = order[start : start + 8]
        batch = pad_batch([examples[i] for i in chosen], workload.settings.pad_token_id)
        keep = batch.attention_mask.bool().reshape(-1)
        rows.append(torch.tensor(chosen)[:, None].expand_as(batch.input_ids).reshape(-1)[keep])
        workload.forward([{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}])
    for handle in handles:
        handle.remove()
    return TokenErrors(torch.cat(rows), torch.stack([torch.cat(errors) for errors in found.values()]))


@dataclass
class Agreement:
    """Choices from a part of what there is against choices from all of it, over clients, layers, seeds and draws.

    Args:
        cases: How many choices were compared.
        equal: How many of them are the same.
        excess: Sum of what the other choice's error has more, as a share of the smallest one.
    """

    cases: int = 0
    equal: int = 0
    excess: float = 0.0

    def add(self, part: Tensor, whole: Tensor) -> None:
        """Compare the choices of one client: errors ``[L, t, N]`` against ``[L, T, N]``."""
        sums = whole.double().sum(1)
        best, chosen = sums.argmin(1), part.double().sum(1).argmin(1)
        self.cases += len(best)
        self.equal += int((best == chosen).sum())
        more = sums.gather(1, chosen[:, None]) / sums.gather(1, best[:, None]) - 1
        self.excess += float(more.sum())

    @property
    def told(self) -> dict[str, float]:
        """Percentages, for the details."""
        shares = {"equal_percent": self.equal / self.cases, "mean_excess_error_percent": self.excess / self.cases}
        return {"cases": self.cases} | {name: 100 * share for name, share in shares.items()}


def budget_against_all(clients: Sequence[TokenErrors], rows: int, budget: int) -> Agreement:
    """Compare a budget of tokens with all tokens of the same rows."""
    found, stream = Agreement(), Generator().manual_seed(0)
    for client in clients:
        for _ in range(DRAWS):
            whole = client.of_rows(rows, stream)
            found.add(whole[:, torch.randperm(whole.shape[1], generator=stream)[:budget]], whole)
    return found


def rows_against_all(clients: Sequence[TokenErrors], rows: int) -> Agreement:
    """Compare all tokens of some rows with all tokens of all the client's rows."""
    found, stream = Agreement(), Generator().manual_seed(0)
    for client in clients:
        for _ in range(DRAWS):
            found.add(client.of_rows(rows, stream), client.errors)
    return found
