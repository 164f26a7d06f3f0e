"""`flexperts methods`: what there is to compare."""

from __future__ import annotations


def command() -> None:
    """List the federated methods: what they do, what is sent, what stays, source."""
    from rich.console import Console
    from rich.table import Table

    from flexperts.methods.registry import method_class, method_names

    table = Table("method", "what it does", "sent", "stays", "source", show_lines=True)
    for name in method_names():
        method = method_class(name)
        table.add_row(name, method.summary, method.sends, method.keeps, method.source)
    Console().print(table)
