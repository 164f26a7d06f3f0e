"""`flexperts methods`: list the federated methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any

import typer

_HEAD = """# Methods

Made by `flexperts methods --markdown` from the methods' own docstrings; a test keeps it current.

A recipe names a method under `[method]` and its settings under `[method.options]`:

```toml
[method]
name = "fedprox"
options = {mu = 0.01}
```

All of them take their loss from the run: the NLL of responses, or DPO's on [preferences](preferences.md).
Where a method has a model per silo although nothing stays, the server has seen each silo's part.
"""


def command(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the text of docs/methods.md.")] = False,
) -> None:
    """List the federated methods: what each does, what is sent, what stays, and its source."""
    if markdown:
        typer.echo(methods_page(), nl=False)
        return
    from rich.table import Column, Table

    from flexperts.terminal.console import console

    columns = ("what it does", "sent", "stays", "model per silo", "source")
    table = Table(Column("method", no_wrap=True), *columns, show_lines=True)
    for method in _methods():
        table.add_row(method.name, method.summary, method.sends, method.keeps, _personalizes(method), method.source)
    console().print(table)
    console().print("equations, choices and options of each: docs/methods.md, or --markdown")


def methods_page() -> str:
    """Return docs/methods.md: a table of all methods, and each one's docstring and options."""
    rows = [
        f"| [{m.name}](#{m.name}) | {m.summary} | {m.sends} | {m.keeps} | {_personalizes(m)} |" for m in _methods()
    ]
    table = ["| method | what it does | sent | stays | model per silo |", "|---|---|---|---|---|", *rows]
    return "\n".join([_HEAD, *table, *(line for method in _methods() for line in _section(method))]) + "\n"


def _personalizes(method: Any) -> str:
    return "yes" if "personalized" in method.states else "no"


def _methods() -> list[Any]:
    from flexperts.methods.registry import method_class, method_names

    return [method_class(name) for name in method_names()]


def _section(method: Any) -> Iterator[str]:
    yield f"\n## {method.name}\n"
    yield f"Source: {method.source}. States that are evaluated: {', '.join(method.states)}.\n"
    yield f"```text\n{inspect.cleandoc(method.__doc__)}\n```"
    fields = method.Options.model_fields
    if fields:
        yield "\n| option | default | meaning |\n|---|---|---|"
        for name, field in fields.items():
            yield f"| `{name}` | `{field.get_default(call_default_factory=True)!r}` | {field.description} |"
