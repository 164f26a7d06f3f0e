"""A run's display in a terminal: stages, progress, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexperts.reports.cells import size
from flexperts.reports.reading import STATES, each_words
from flexperts.terminal.live import ProgressDisplay


class RunDisplay(ProgressDisplay):
    """Observer that shows all events of a run with rich; as plain lines if the output is not a terminal.

    Args:
        console: Where to; stdout by default.
        stages_last: Whether a stage lasts until the next; at a silo it has ended when it is told.
    """

    def __init__(self, console: Console | None = None, *, stages_last: bool = True) -> None:
        super().__init__(console)
        self._stages_last = stages_last

    def stage(self, text: str) -> None:
        """Print the stage that begins."""
        self.say(text)
        super().stage(text if self._stages_last else "")

    def chosen(self, client: str, choice: Mapping[str, Sequence[int]]) -> None:
        """Print the experts that a client grafts, layer by layer."""
        experts = " ".join("+".join(map(str, indices)) for indices in choice.values())
        self.console.print(f"  {client} grafts experts {experts}", soft_wrap=True)

    def split(self, method: str, table: Sequence[Mapping[str, Any]]) -> None:
        """Print the table of what trains, what is sent and what stays."""
        self.console.print(split_table(method, table))

    def round(self, record: Mapping[str, Any]) -> None:
        """Print one line for a finished round."""
        super().round(record)
        clients = record["clients"].values()
        for word, names in (("missing", record.get("missing")), ("without scores", record.get("unscored"))):
            if names:
                self.console.print(f"  {word}: {', '.join(names)}", style="yellow", soft_wrap=True)
        if not clients:
            self.console.print("  no client trains")
            return
        losses = [c["loss"] for c in clients if "loss" in c]  # with local noise, clients do not send them
        loss = f"mean loss {sum(losses) / len(losses):.3f}, " if losses else ""
        sent = sum(record["uplink"].values())
        self.console.print(
            f"  {loss}{size(sent).text} sent by {len(clients)} clients, "
            f"training {record['seconds']['training']:.0f} s"
        )

    def result(self, summary: Mapping[str, Any], out: Path) -> None:
        """Print the final table, bytes and times."""
        self.console.print(score_table(summary))
        for line in score_notes(summary):
            self.notice(line)
        for source in (summary, summary.get("reference") or {}):
            if source.get("floor"):
                self.console.print(floor_table(source))
        sent = summary["bytes"]
        self.console.print(
            f"{each_words(sent)}: {size(sent['uplink_per_client_per_round']).text} up, "
            f"{size(sent['downlink_per_client_per_round']).text} down, {sent['personal_sent']} personal bytes sent",
            soft_wrap=True,
        )
        if privacy := summary.get("privacy"):
            self.console.print(
                f"{privacy['mode']} differential privacy of the shared weights, per client: "
                f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g}"
            )
        total = summary["seconds"]["total"] + summary.get("reference", {}).get("seconds", {}).get("total", 0.0)
        self.console.print(f"{total:.0f} s in all; everything is in {out}", soft_wrap=True)


def split_table(method: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a method's parameter split; the caption says what is sent and what stays."""
    from flexperts.methods.registry import method_class

    chosen = method_class(method)
    words = f"sent: {chosen.sends}; stays: {chosen.keeps}"
    table = Table(title=f"{method}: parameters of one client", title_justify="left", caption=words)
    table.caption_justify = "left"
    for column in ("group", "tensors", "parameters", "size", "trained", "leaves"):
        table.add_column(column, justify="right" if column in ("tensors", "parameters", "size") else "left")
    for row in rows:
        numbers = (str(row["tensors"]), f"{row['parameters']:,}", size(row["bytes"]).text)
        place = (str(row["trained"]), str(row["leaves"])) if row["tensors"] else ("-", "-")
        table.add_row(str(row["group"]), *numbers, *place)
    return table


def score_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of every client's ROUGE-L and NLL in every state, with the reference method's scores."""
    from flexperts.server.summary import scores_title

    columns, what = _columns(summary), scores_title("reward_accuracy" in summary["mean"])
    table = Table(title=f"{what} on each client's own test split", title_justify="left")
    table.add_column("client", overflow="fold")  # names are never cut
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for client in summary["clients"]:
        table.add_row(client, *(_cell(source["clients"].get(client), state) for _, source, state in columns))
    for client in summary.get("unscored", {}):
        table.add_row(client, *("-" for _ in columns))
    table.add_section()
    table.add_row("mean", *(_cell(source["mean"], state) for _, source, state in columns))
    return table


def floor_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of what clients keep: all candidates' loss on validation rows, and its own on test rows."""
    from flexperts.methods.kit.candidates import CANDIDATES

    clients = summary["floor"]
    shown = [name for name in CANDIDATES if any(name in its["validation"] for its in clients.values())]
    loss = "DPO loss" if "reward_accuracy" in summary["mean"] else "NLL"
    title = f"{summary['method']}: the model that each client keeps, by {loss} on its validation rows"
    table = Table("client", "keeps", title=title, title_justify="left")
    for name in (*shown, "kept, test"):
        table.add_column(STATES.get(name, name), justify="right")
    for client, its in clients.items():
        nlls = [*(its["validation"].get(name) for name in shown), its["test"][its["chosen"]]]
        texts = ("-" if nll is None else f"{nll:.3f}" for nll in nlls)
        table.add_row(client, STATES.get(its["chosen"], its["chosen"]), *texts)
    return table


def _columns(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    method, reference = summary["method"], summary.get("reference")
    columns: list[tuple[str, Mapping[str, Any], str]] = [("zero-shot", summary, "zero_shot")]
    sources = [(reference["method"], reference)] if reference else []
    for name, source in [*sources, (method, summary)]:
        for state in ("global", "personalized"):
            if state in _states(source):
                columns.append((f"{name} {state}", source, state))
    return columns


def _states(summary: Mapping[str, Any]) -> set[str]:
    """Return the states that were scored, also those without a finite score."""
    nlls = [client["nll"] for client in summary["clients"].values()]
    scored = {state for by_state in nlls for state, nll in by_state.items() if nll is not None}
    return scored.union(*(summary.get("not_finite") or {}).values())


def _cell(scores: Mapping[str, Any] | None, state: str) -> str:
    from flexperts.server.summary import scores_text

    return "-" if scores is None else scores_text(scores, state)


def score_notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on a table of scores: why scores are missing, and which answers were cut."""
    for source in [summary, *([summary["reference"]] if summary.get("reference") else [])]:
        for client, states in (source.get("not_finite") or {}).items():
            for state, why in states.items():
                yield f"{source['method']}, {client}, {STATES.get(state, state)}: no score; {why}"
        if line := cut_line({name: client.get("answers") for name, client in source["clients"].items()}):
            yield f"{source['method']}: {line}"


def cut_line(answers: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return a line with the cut answers of each client in its last state, and the number of longer references.

    Args:
        answers: Client -> its ``answers`` in a summary.
    """
    told = {name: its for name, its in answers.items() if its}
    states, shown = [], []
    for name, its in told.items():
        counted = [(state, count) for state, count in its["cut"].items() if count is not None]
        if counted:
            state, count = counted[-1]
            states.append(STATES.get(state, state))
            shown += [f"{name} {count}"] if count else []
    longer = sum(its["longer_references"] or 0 for its in told.values())
    limits = " or ".join(map(str, sorted({its["max_new_tokens"] for its in told.values()})))
    named = " or ".join(dict.fromkeys(states))
    parts = [f"{named} answers cut at {limits} tokens: {', '.join(shown)}"] if shown else []
    parts += [f"{longer} references are longer than {limits} tokens"] if longer else []
    return "; ".join(parts)
