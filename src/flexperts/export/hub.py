"""Exported folders on the Hugging Face hub: what leaves this machine, sending it, fetching it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from flexperts.errors import ArtifactError, ConfigError, PrivacyError, one_line

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.py", "*.txt", "*.model", "README.md")
"""Files that a model may need."""


def check_name(repo_id: str) -> None:
    """Refuse a name that no repository can have.

    Args:
        repo_id: ``name`` or ``owner/name``.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        rule = f"no repository can have this name ({one_line(str(error))})"
        raise ConfigError(f"hub repository {repo_id!r}", rule, "write owner/name") from error


def folder_name(repo_id: str) -> str:
    """Return the last part of a repository's name: that of the folder that is sent to it."""
    return repo_id.rpartition("/")[2]


def leaving(folder: Path, repo_id: str, client: str | None, *, private: bool) -> tuple[str, str]:
    """Return what leaves this machine when a folder is sent, in two lines.

    Args:
        folder: The exported folder.
        repo_id: Where it goes.
        client: The client on whose rows alone a part of it was trained, if any.
        private: Whether only the repository's owner may read it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size, names = sum(path.stat().st_size for path in files), ", ".join(path.name for path in files)
    kind, whose = "private" if private else "PUBLIC", f"{client}'s model" if client else "the model of all silos"
    rows = "its rows" if client else "their rows"
    named = "names it, with scores" if client else "names them, with their scores"
    return (
        f"sending {whose} to {repo_id} ({kind}): {size / 1e6:.1f} MB in {names}",
        f"  the weights were trained on {rows} and may repeat them; the card {named} and counts of rows; "
        "no row is sent",
    )


def push(folder: Path, repo_id: str, *, private: bool, token: str | None = None) -> str:
    """Upload a folder to the hub, and return its address there.

    Args:
        folder: The exported folder.
        repo_id: ``name`` or ``owner/name``; the repository is created if it does not exist.
        private: Whether only its owner may read it; a public repository of this name is then refused.
        token: The hub's access token; by default the one that is stored on this machine.

    Raises:
        PrivacyError: ``private`` is true, and the repository exists and is public.
        ArtifactError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(whole).private:
            rule = "it exists and is public, and a private one was asked for"
            raise PrivacyError(f"hub repository {whole}", rule, "make it private, or choose another name")
        return str(api.upload_folder(repo_id=whole, folder_path=folder))
    except PrivacyError:
        raise
    except Exception as error:  # the library raises many kinds, for the network, for rights, for names
        rule = f"the model cannot be uploaded ({one_line(str(error))})"
        raise ArtifactError(f"hub repository {repo_id}", rule, "check the name, the token, the network") from error


def fetched(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder of a hub repository on this machine; only files that a model may need are fetched.

    Raises:
        ArtifactError: The hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[*_FILES]))
    except Exception as error:  # likewise
        raise ArtifactError(
            f"model {repo_id!r}",
            f"there is no such folder, and the hub does not give it ({one_line(str(error))})",
            "check the path or the id, the token, and the network",
        ) from error
