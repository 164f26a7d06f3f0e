"""API keys: who may call which client's models. Only SHA-256 hashes of keys are stored.

A key has 256 random bits, so that it cannot be guessed from its unsalted hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import tomli_w

from flexperts.config.names import normal
from flexperts.errors import ConfigError
from flexperts.files import content_of, write_text

OPERATOR = "*"
"""Owner of the keys that may call every model and read the metrics; no client can have this name."""
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_HEADER = """\
# Who may call which client's models: SHA-256 hashes of keys, not the keys. "*" may call all models.
# To revoke a key, delete its hash. --make-keys adds a key for every owner without one. Read when the server starts.
"""


class KeyRing:
    """Hashes of keys by owner.

    Args:
        hashes: Client or ``"*"`` -> hashes as ``sha256:`` and 64 hex digits.
    """

    def __init__(self, hashes: Mapping[str, Iterable[str]]) -> None:
        self._owners = [(digest.encode(), owner) for owner, digests in hashes.items() for digest in digests]

    def owner(self, key: str) -> str | None:
        """Return the key's owner, or None if it has none; the time taken does not depend on the key's value."""
        given, found = hash_of(key).encode(), None
        for digest, owner in self._owners:
            if hmac.compare_digest(digest, given):
                found = owner
        return found


def may_call(owner: str, client: str) -> bool:
    """Return whether the owner of a key may call a client's models, in any state."""
    return owner in (OPERATOR, client)


def new_key() -> str:
    """Return a new random key."""
    return f"fx-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """Return the hash under which a key is stored."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def load_keys(path: Path, clients: Collection[str]) -> KeyRing:
    """Read a file of hashes.

    Args:
        path: The TOML file, which only its owner may read and write.
        clients: The run's clients.
    """
    return KeyRing(_hashes(path, clients))


def make_keys(path: Path, clients: Collection[str]) -> dict[str, str]:
    """Make a key for every client and for the operator, except for owners with a key in the file.

    Args:
        path: The file of hashes; created if missing.
        clients: The run's clients.

    Returns:
        Owner -> new key. The keys cannot be read again later.
    """
    hashes = _hashes(path, clients) if path.exists() else {}
    new = {owner: new_key() for owner in (OPERATOR, *sorted(clients)) if not hashes.get(owner)}
    hashes |= {owner: [hash_of(key)] for owner, key in new.items()}
    write_text(path, _HEADER + tomli_w.dumps({"keys": hashes}))
    return new


def _hashes(path: Path, clients: Collection[str]) -> dict[str, list[str]]:
    if not path.exists():
        raise ConfigError(f"{path}", "there is no such file of keys", f"create it with --make-keys {path}")
    content = content_of(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}", "group or others can read or write it", f"chmod 600 {path}")
    try:
        found = tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(
            f"{path}", f"it is not valid TOML ({error})", "correct it at this place, or create it with --make-keys"
        ) from error
    keys = found.get("keys")
    if set(found) != {"keys"} or not isinstance(keys, dict):
        raise ConfigError(f"{path}", "it must have one table, [keys]", "create it with --make-keys")
    if len({*map(normal, keys)}) < len(keys):
        raise ConfigError(
            f"{path}",
            "it names one owner twice, in two Unicode forms",
            "merge the two lists of hashes under one name",
        )
    for owner, hashes in keys.items():
        _check(path, owner, hashes, clients)
    return {normal(owner): hashes for owner, hashes in keys.items()}


def _check(path: Path, owner: str, hashes: object, clients: Collection[str]) -> None:
    """Refuse an invalid entry; the message does not repeat its values, which may be pasted keys."""
    if owner != OPERATOR and normal(owner) not in clients:
        known = ", ".join(sorted(clients))
        raise ConfigError(f"{path}: {owner!r}", f"the run's clients are {known}", 'name one of them, or "*"')
    if not isinstance(hashes, list) or not all(isinstance(h, str) and _HASH.fullmatch(h) for h in hashes):
        raise ConfigError(
            f"{path}: the keys of {owner!r}",
            "they must be a list of hashes, each sha256: and 64 hex digits",
            "create them with --make-keys, or with `printf %s KEY | sha256sum`",
        )
