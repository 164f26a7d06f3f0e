"""The cryptography of secure aggregation: functions of `cryptography` and PyCryptodome, given our values.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 (RFC 8439), AES-256-GCM (NIST SP 800-38D), Ed25519
(RFC 8032), and Shamir's sharing over GF(2^128). Secrets, shares and keys have 32 bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flexperts.communication.secure.fixed_point import Ring

SIZE = 32
"""Bytes of a secret, a share and a key."""
_HALF = 16
"""Bytes of a secret of PyCryptodome's sharing; ours are two of them."""
_NONCE = 12
_TRIES = 64
"""Most sets of shares that are tried for a secret, when some shares are wrong."""


def new_secret() -> bytes:
    """Return random bytes of the operating system; as a private key they need no other form."""
    return os.urandom(SIZE)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, *context: str | int) -> bytes:
    """Return the key that two parties agree on, for one context.

    Raises:
        ValueError: The public key is one that gives the same key with any private one.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return derived(shared, *context)


def derived(secret: bytes, *context: str | int) -> bytes:
    """Return a key from a secret, for one context; keys of other contexts say nothing of it."""
    return HKDF(SHA256(), SIZE, salt=None, info=text_of(context)).derive(secret)


def keystream(key: bytes, size: int, dtype: np.dtype[np.unsignedinteger]) -> Ring:
    """Return ``size`` pseudo-random numbers from a key that is used for nothing else."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(_HALF)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(size * dtype.itemsize)), dtype)


def seal(key: bytes, text: bytes, *context: str | int) -> bytes:
    """Encrypt and authenticate a text, together with a context that is not sent."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, text, text_of(context))


def opened(key: bytes, sealed: bytes, *context: str | int) -> bytes | None:
    """Return a sealed text; None if it was sealed with another key, in another context, or was changed."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], text_of(context))
    except (InvalidTag, ValueError):
        return None


def identity_key(private: bytes) -> bytes:
    """Return the Ed25519 public key of a private one."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def signed(private: bytes, *text: str | int) -> bytes:
    """Return a signature of some values."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(text_of(text))


def is_signed(public: bytes, signature: bytes, *text: str | int) -> bool:
    """Return whether a signature of some values is right."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text_of(text))
    except (InvalidSignature, ValueError):
        return False
    return True


def shares_of(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return shares 1 to ``count`` of a secret; any ``threshold`` of them give it, fewer say nothing."""
    halves = [Shamir.split(threshold, count, part, False) for part in (secret[:_HALF], secret[_HALF:])]
    return [first + second for (_, first), (_, second) in zip(*halves, strict=True)]


def secret_of(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly as many shares, by number, as its threshold."""
    parts = ([(number, share[at : at + _HALF]) for number, share in shares.items()] for at in (0, _HALF))
    return b"".join(Shamir.combine(part, False) for part in parts)


def secret_among(
    shares: Mapping[int, bytes], threshold: int, is_right: Callable[[bytes], bool]
) -> tuple[bytes | None, list[int]]:
    """Return the secret of shares of which some may be wrong, and the numbers of the wrong ones.

    Args:
        shares: Number -> share.
        threshold: As many give the secret.
        is_right: Whether this is the secret.
    """
    numbers: Sequence[int] = sorted(shares)
    for tried, chosen in enumerate(islice(combinations(numbers, threshold), _TRIES)):
        secret = secret_of({number: shares[number] for number in chosen})
        if is_right(secret):
            others = [number for number in numbers if number not in chosen] if tried else []
            kept = {number: shares[number] for number in chosen[1:]}
            return secret, [n for n in others if secret_of(kept | {n: shares[n]}) != secret]
    return None, []


def text_of(values: Sequence[str | int]) -> bytes:
    """Return values as bytes, in which no two lists of values are alike."""
    return json.dumps(list(values), separators=(",", ":")).encode()
