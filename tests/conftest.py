"""Fixtures that several test folders share."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if any(
    word == "pretend_cuda" or "tests/pretend_cuda" in word for word in sys.argv
):  # before anything imports torch
    sys.path.append(str(Path(__file__).parent / "pretend_cuda"))
    import backend

    backend.load()

import torch
from hypothesis import settings

from flexperts.config.run import RunConfig
from flexperts.data.silos.generate import write_silos
from flexperts.methods import registry
from flexperts.recipe import parse_recipe
from flexperts.terminal import live
from flexperts.testing import byte_tokenizer, save_tiny_base

collect_ignore = [] if "backend" in sys.modules else ["pretend_cuda"]

# A test that is slow beside others is not wrong.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")

# Tiny matrices gain nothing from threads, and tests that run side by side would wait for each other's.
torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In a shell's background job; the commands that tests stop would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep modules and tests, a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """A run waits for the disk at every file that it writes; what tests write need not outlive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_line_while_starting() -> Iterator[None]:
    """On a busy machine a command may take so long that it says on stderr that it is still starting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "_FIRST", math.inf)
        yield


@pytest.fixture(scope="session")
def byte_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny qwen2_moe with a byte tokenizer and a chat template."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "bytes", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sub-folder per silo, of 8 train and 4 test rows each; tests only read it."""
    folder = tmp_path_factory.mktemp("silos")
    write_silos(folder, 0, 8, 4)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tokens for the words of the silos' rows: a quarter of the tokens, and half of a run's time."""
    return _base_of_words(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with inputs that are wide enough to hold the tokens of a row apart."""
    return _base_of_words(tmp_path_factory.mktemp("base"), hidden_size=256)


def _base_of_words(folder: Path, **settings: int) -> Path:
    size = 1024
    write_silos(folder / "silos", 0, 8, 4)
    files = sorted(folder.glob("silos/*/*.jsonl"))
    texts = ["<|user|> <|assistant|>", *(file.read_text(encoding="utf-8") for file in files)]
    of_bytes = byte_tokenizer()
    learnt = of_bytes.train_new_from_iterator(texts, size, show_progress=False)
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    words = {"".join(pair): i for i, pair in enumerate(merges, len(of_bytes))}
    base = save_tiny_base(folder / "tiny", max_position_embeddings=1024, vocab_size=size, **settings)
    whole = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    whole["model"] |= {"merges": merges, "vocab": of_bytes.get_vocab() | words}
    (base / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return base


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the methods that a test registers."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_LOADED", dict(registry._LOADED))


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skip where the sandbox of ``flexperts silo units`` cannot run."""
    if missing := [tool for tool in ("bwrap", "socat") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    words = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def tiny_model(tiny_base: Path) -> str:
    """A recipe's section with the tiny base."""
    return f'[model]\nbase = "{tiny_base}"\ndtype = "float32"\nprecision = "fp32"\n'


@pytest.fixture(scope="session")
def recipe(tiny_model: str) -> Callable[..., RunConfig]:
    """Return a function that makes a recipe of a few seconds on the tiny base, with overrides on top."""

    def make(*overrides: str) -> RunConfig:
        text = f"""
            {tiny_model}
            [data.silos]
            train_rows = 8
            test_rows = 4
            [training]
            max_length = 640
            [federation]
            rounds = 2
            [evaluation]
            max_new_tokens = 4
        """
        return parse_recipe(text, overrides)

    return make


@pytest.fixture(scope="session")
def _workspace(recipe: Callable[..., RunConfig]) -> Any:
    from flexperts.client.workspace import Workspace

    return Workspace(recipe())


@pytest.fixture
def shared_base(_workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs of recipes on the tiny base use one that is in memory, and what is known of it untouched."""
    monkeypatch.setattr("flexperts.engines.run.Workspace", lambda config, given: _workspace.for_run(config))


@pytest.fixture(scope="session")
def _code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One place where transformers keeps copies of the code of exported folders, since Python imports it."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def exports_checked_here(
    _code_cache: None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Check exports in this process, not in fresh ones; return each one's code, tokens, and the run's logits."""
    from flexperts.export import exporting

    from .checked_here import verify

    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def check(code: str, tokens: torch.Tensor, reference: torch.Tensor, *others: Any, without: str) -> Any:
        seen.append((code, tokens, reference))
        return verify(code, tokens, reference, *others, without=without)

    monkeypatch.setattr(exporting, "verify", check)
    return seen
