"""Where transformers keeps copies of the code of exported folders: one place, since Python imports it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils


@pytest.fixture(scope="session", autouse=True)
def _own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
