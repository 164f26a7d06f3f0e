"""The tables of a comparison, for the HTML page, for Markdown and for the terminal."""

from __future__ import annotations

from flexperts.reports.answer_table import answer_table
from flexperts.reports.cells import Table
from flexperts.reports.cost_tables import cost_table, groups_table, privacy_table
from flexperts.reports.reading import Comparison
from flexperts.reports.routing_tables import routing_table, selection_table
from flexperts.reports.score_tables import ability_table, client_table, main_table
from flexperts.reports.setup_tables import entries_table, environment_table


def tables(comparison: Comparison) -> dict[str, Table]:
    """Return every table that has a row, by key, in the order in which they are read.

    Keys: main, clients-rouge_l, clients-nll, answers, ability, cost, groups, privacy, routing, selection, entries,
    environment.
    Columns in which every number is missing are left out.
    """
    made = (
        main_table(comparison),
        client_table(comparison, "rouge_l"),
        client_table(comparison, "nll"),
        answer_table(comparison),
        ability_table(comparison),
        cost_table(comparison),
        groups_table(comparison),
        privacy_table(comparison),
        routing_table(comparison),
        selection_table(comparison),
        entries_table(comparison),
        environment_table(comparison),
    )
    shown = (table.without_empty_columns() for table in made if table.rows)
    return {table.key: table for table in shown if len(table.header) > 1}
