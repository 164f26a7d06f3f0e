"""Exports in this folder are loaded in this process too."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_code_cache(_code_cache: None) -> None:
    """Keep the code of exported folders out of the user's cache."""
