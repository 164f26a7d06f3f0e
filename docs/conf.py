"""Sphinx: the pages of this folder, and the API reference from the docstrings. `make docs` builds it, offline."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path
from typing import Any

import flexperts

# autodoc sets TYPE_CHECKING while it imports, under which pydantic cannot build models with extra="allow".
import flexperts.serving.http.openai

ROOT = Path(__file__).parents[1]

project = "flexperts"
version = release = flexperts.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # as GitHub makes them

napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "model_config"}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
default_role = "literal"
highlight_language = "text"

html_theme = "furo"
html_title = "flexperts"
html_show_sourcelink = False


def entry(home: str, name: str) -> str:
    """Return the directive that documents a public name."""
    kind = "class" if isinstance(getattr(flexperts, name), type) else "function"
    return f".. auto{kind}:: flexperts.{home}.{name}\n"


def write_reference() -> None:
    """Write docs/api/index.rst, which is not committed: the public names, and nothing else."""
    title = "API reference"
    text = [
        title,
        "=" * len(title),
        "",
        "``from flexperts import ...``; loaded when first used. Names that are not on this page are",
        "internal and may change with any version; see :doc:`../contributing`. Settings: :doc:`../settings`.",
        "",
        *(entry(home, name) for name, home in flexperts._HOMES.items()),
        "Testing",
        "-------",
        "",
        ".. automodule:: flexperts.testing",
        "",
    ]
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    (folder / "index.rst").write_text("\n".join(text), encoding="utf-8")


ROOT_PAGES = {"overview": "README.md", "architecture": "ARCHITECTURE.md", "contributing": "CONTRIBUTING.md"}


def show_root_pages(_app: Any, name: str, source: list[str]) -> None:
    """Put the pages of the repository's root in the place of their stubs here, and turn links to follow them."""
    root = "../" * (name.count("/") + 1)
    text = source[0]
    if name in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[name]).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!#|\w+:)", f"]({root}", text).replace(f"]({root}docs/", "](/")
    for stub, page in ROOT_PAGES.items():
        text = text.replace(f"]({root}{page}", f"](/{stub}.md")
    source[0] = text


def as_meant(_app: Any, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Keep docstrings as they are meant, and let settings say their default.

    An indented paragraph is shown as it stands; |S| is a size; in a setting's "a: b", a is no type.
    """
    written, lines[:] = list(lines), []
    verbatim = False
    for line in written:
        if line and not line.startswith("    "):
            verbatim = False
        elif line and not verbatim and len(lines) > 1 and not lines[-1] and not lines[-2].startswith(" "):
            lines += ["::", ""]
            verbatim = True
        lines.append(line if verbatim else without_bars(line))
        verbatim = verbatim or line.endswith("::")
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\ ")  # nothing, but napoleon looks for a type in the first line only
        lines.extend(default_of(name))


def without_bars(line: str) -> str:
    """Return a line whose bars are no substitutions, but in literals."""
    parts = line.split("``")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "``".join(parts)


def default_of(name: str) -> list[str]:
    """Return what a setting's description says of its default; nothing for what is no setting of a recipe."""
    owner, _, attribute = name.rpartition(".")
    field = getattr(pydoc.locate(owner), "model_fields", {}).get(attribute)
    if field is None or field.is_required():
        return []
    value = field.get_default(call_default_factory=True)
    return [] if hasattr(value, "model_fields") else ["", f"Default: ``{value!r}``", ""]


def signature_of(
    _app: Any, _what: str, _name: str, found: Any, _options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Leave out the signature of a recipe's section: its settings stand below."""
    return ("", "") if hasattr(found, "model_fields") else (signature, returns)


def setup(app: Any) -> None:
    """Let Sphinx know."""
    write_reference()
    app.connect("autodoc-process-docstring", as_meant, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature_of)
    app.connect("source-read", show_root_pages)
