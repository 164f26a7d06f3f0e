"""Sphinx: the pages of this folder, and the API reference from the docstrings. `make docs` builds it, offline."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flexperts

# autodoc sets TYPE_CHECKING while it imports, under which pydantic cannot build models with extra="allow".
import flexperts.serving.http.openai

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "flexperts"

project = "flexperts"
version = release = flexperts.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # as GitHub makes them

napoleon_numpy_docstring = False
autosummary_generate = False  # its tables are used, its pages are not
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "model_config"}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
default_role = "literal"
highlight_language = "text"
nitpicky = True
# To look up the names of others would need the network; private names and a type variable have no page.
nitpick_ignore_regex = [("py:.*", r"(?!flexperts\.).*"), ("py:.*", r".*\._\w+|flexperts.selection.rules.Layer")]

html_theme = "furo"
html_title = "flexperts"
html_show_sourcelink = False


def levels() -> list[tuple[str, list[str], str]]:
    """Return the reference's sections: the title, parts and meaning of every level, as ARCHITECTURE.md has them."""
    block = re.search(r"```text\n(0 .*?)```", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    lines = [re.match(r"(\d+) +([a-z_ ]+?)  +(.*)", line) for line in block[1].splitlines()]
    found = [(f"Level {line[1]}", line[2].split(), line[3]) for line in lines if line]
    return [*found, ("Testing", ["testing"], "tiny models, for tests of yours, too")]


def modules(part: str) -> Iterator[str]:
    """Yield a part's modules, the package itself first."""
    yield f"flexperts.{part}"
    for path in sorted((PACKAGE / part).rglob("*.py")):
        inside = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.name != "__init__.py" and ".app." not in inside:  # Flower's app imports no more than it is told
            yield f"flexperts.{inside}"


def titled(title: str, underline: str, *body: str) -> str:
    """Return a section in reStructuredText."""
    return "\n".join([title, underline * len(title), "", *body, ""])


def part_page(part: str) -> str:
    """Return the page of one part: a section for each of its modules."""
    first, *others = modules(part)
    sections = [titled(name, "-", f".. automodule:: {name}") for name in others]
    return "\n".join([titled(first, "=", f".. automodule:: {first}"), *sections])


def toctree(parts: list[str]) -> list[str]:
    """Return the lines that list parts with their modules."""
    return [".. toctree::", "   :maxdepth: 2", "", *(f"   {part}" for part in parts)]


def index_page() -> str:
    """Return the reference's first page: the public names, then the parts by level."""
    names = [f"   ~flexperts.{home}.{name}" for name, home in flexperts._HOMES.items()]
    public = titled("Public names", "-", "``from flexperts import ...``; loaded when first used.", "")
    table = "\n".join([".. autosummary::", "", *names, ""])
    groups = [titled(title, "-", f"{meaning}.", "", *toctree(parts)) for title, parts, meaning in levels()]
    head = titled("API reference", "=", "Parts import from smaller levels only; see :doc:`../architecture`.")
    return "\n".join([head, public, table, *groups])


def write_reference() -> None:
    """Write docs/api, which is not committed; a page that is as it was stays, so that Sphinx need not read it."""
    parts = [part for _, found, _ in levels() for part in found]
    pages = {"index": index_page(), **{part: part_page(part) for part in parts}}
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


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
    source[0] = re.sub(rf"\]\({root}src/flexperts/(\w+)\)", r"](/api/\1.rst)", text)


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
