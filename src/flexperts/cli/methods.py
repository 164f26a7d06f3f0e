"""`flexperts methods`: what there is to compare."""

from __future__ import annotations


def command() -> None:
    """List the federated methods: name, what they do, source."""
    from rich.console import Console
    from rich.table import Table

    from flexperts.methods.registry import method_class, method_names

    table = Table("method", "what is sent and what stays", "source")
    for name in method_names():
        method = method_class(name)
        table.add_row(name, method.summary, method.source)
    Console().print(table)
