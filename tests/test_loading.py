"""Nothing that the package reads can run code: no pickle, no eval, no shell, and models only as safetensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "flexperts"
FILES = sorted(SOURCE.rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {
    "eval", "exec", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package",
    "os.system", "os.popen", "runpy.run_path", "runpy.run_module",
    "subprocess.getoutput", "subprocess.getstatusoutput", "importlib.util.spec_from_file_location",
}  # fmt: skip
# Connection.send and .recv pickle; send_bytes and recv_bytes do not.
METHODS = {"recv", "send"}
SOCKETS = {"multiprocessing", "multiprocessing.connection"}
OWN_PROCESSES = {"engines/pool.py", "engines/fork_server.py"}
"""Files that pickle: they talk with processes that they have started, over socket pairs that no other can open."""
YAML = "config/yaml_tree.py"
"""It has PyYAML parse a text into nodes, and makes no objects with it."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> list[str]:
    """Return what in a file could run what it reads."""
    tree = ast.parse(source)
    found = [f"imports {name}" for name in imported(tree) if name.split(".")[0] in MODULES]
    talks = any(name in SOCKETS for name in imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += call(node, talks)
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (alias.name for alias in node.names)


def call(node: ast.Call, talks: bool) -> Iterator[str]:
    name, options = dotted(node.func), {k.arg: k.value for k in node.keywords}
    last = node.func.attr if isinstance(node.func, ast.Attribute) else name
    if name in CALLS or last == "read_pickle":
        yield f"calls {name}"
    if name in ("np.load", "numpy.load") and not is_false(options.get("allow_pickle")):
        yield "np.load without allow_pickle=False"
    if "shell" in options and not is_false(options["shell"]):
        yield "a shell"
    if talks and last in METHODS:
        yield f"pickles in {name}"
    if last == "from_pretrained":
        yield from pretrained(name, options)


def pretrained(name: str, options: dict[str | None, ast.expr]) -> Iterator[str]:
    trusted = options.get("trust_remote_code")
    if "Auto" in name and (trusted is None or getattr(trusted, "value", None) is True):
        yield f"{name} without trust_remote_code"
    safe = options.get("use_safetensors")
    if "ForCausalLM" in name and getattr(safe, "value", None) is not True:
        yield f"{name} without use_safetensors=True"


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_unsafe_is_loaded(path: Path) -> None:
    found = unsafe(path.read_text(encoding="utf-8"))
    if str(path.relative_to(SOURCE)) in OWN_PROCESSES:
        assert found
        found = [one for one in found if "pickle" not in one]
    if str(path.relative_to(SOURCE)) == YAML:
        calls = {dotted(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert {name for name in calls if name.startswith("yaml.")} == {"yaml.compose"}
        found.remove("imports yaml")
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle", "from pickle import loads", "import numpy, cloudpickle", "import yaml",
        "def f():\n    import dill", "torch.load(path)", "torch.load(path, weights_only=True)",
        "torch.hub.load(x)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "eval(text)", "exec(text)", "__import__(name)",
        "subprocess.run(x, shell=True)", "subprocess.run(x, shell=flag)", "os.system(x)", "pandas.read_pickle(x)",
        "from multiprocessing.connection import Listener\nListener(x).accept().recv()",
        "import multiprocessing\nconnection.send(value)", "AutoTokenizer.from_pretrained(x)",
        "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)", "LlamaForCausalLM.from_pretrained(x)",
        "AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_is_planted_is_found(planted: str) -> None:
    assert unsafe(planted) != []


@pytest.mark.parametrize(
    "harmless",
    [
        "np.load(path, allow_pickle=False)", "safetensors.torch.load(data)", "model.eval()", "subprocess.run(x)",
        "from multiprocessing.connection import Listener\nListener(x).accept().recv_bytes()", "json.loads(text)",
        "AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=config.trust)",
        "generator.send(x)", "re.compile(x)",
    ],
)  # fmt: skip
def test_what_is_harmless_is_not(harmless: str) -> None:
    assert unsafe(harmless) == []
