"""The public API as text: every public name with its signature, to be compared in review.

python dev/public_api.py        writes dev/public-api.txt
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import flexperts
from flexperts import testing

LIST = Path(__file__).with_name("public-api.txt")


def public_api() -> str:
    """Return a line for every public name and every public member of a class."""
    lines = [line for name in flexperts.__all__ for line in described(name, getattr(flexperts, name))]
    defined = [n for n, v in vars(testing).items() if getattr(v, "__module__", "") == testing.__name__]
    for name in sorted(name for name in defined if not name.startswith("_")):
        lines += described(f"testing.{name}", getattr(testing, name))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", "\n".join(lines)) + "\n"


def described(name: str, found: Any) -> list[str]:
    """Return the lines of a function, or of a class and what it defines itself or inherits from this package."""
    if not isinstance(found, type):
        return [f"{name}{inspect.signature(found)}"]
    settings = getattr(found, "model_fields", {})
    lines = [f"{name}({', '.join(settings)})" if settings else f"{name}{inspect.signature(found)}"]
    for member in sorted(set(dir(found)) - set(settings)):
        owner = next(c for c in found.__mro__ if member in vars(c))
        if not member.startswith("_") and owner.__module__.startswith("flexperts"):
            lines.append(f"{name}.{member}{signature(inspect.getattr_static(found, member))}")
    return lines


def signature(member: Any) -> str:
    """Return a method's signature; nothing for an attribute or a property."""
    bare = getattr(member, "__func__", member)
    return str(inspect.signature(bare)) if inspect.isfunction(bare) else ""


if __name__ == "__main__":
    LIST.write_text(public_api(), encoding="utf-8")
