"""A silo on the tiny base, and a server that asks its worker whatever it likes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from flexperts.communication.messages import info_of, payload_of, records
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.data.silos.generate import write_silos
from flexperts.deployment.settings import at_silos
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.parameters.vector import Payload
from flexperts.recipe import load_silo

RUN = "0123456789abcdef" * 2
OTHER = "f" * 32
STATES = ["zero_shot", "global", "personalized"]


def silo_file(folder: Path, base: Path, *policy: str, test_rows: int = 8) -> Path:
    """Write the file of the silo `clinic` and its rows, with lines of its policy."""
    write_silos(folder / "rows", 0, 8, test_rows)
    rows = folder / "rows" / "clinic"
    path = folder / "silo.toml"
    path.write_text(
        f'name = "clinic"\nstate = "state"\nbase = "{base}"\ndtype = "float32"\ndevice = "cpu"\n'
        f'[data]\ntrain = "{rows}/train.jsonl"\ntest = "{rows}/test.jsonl"\n[policy]\n' + "\n".join(policy)
    )
    return path


class AskedSilo:
    """A silo's worker and the server's side of it.

    Args:
        file: The silo's file.
        recipe: The function that makes recipes.
    """

    def __init__(self, file: Path, recipe: Callable[..., RunConfig]) -> None:
        self.file, self._recipe = file, recipe
        self.state = file.parent / "state"
        make_private(self.state)
        self.restart()

    def restart(self) -> None:
        """Start the worker anew, as after a crash."""
        self.worker = Worker(load_silo(self.file))

    def handed(self, *overrides: str) -> str:
        """Return a recipe as the server sends it."""
        return at_silos(self._recipe("training.local_steps=2", *overrides)).to_toml()

    def raw(self, kind: str, content: RecordDict, recipe: str, run: str = RUN) -> bytes:
        """Return the bytes of a reply."""
        return self.worker.reply(serialize({"kind": kind, "run": run, "recipe": recipe}, content))

    def refusal(self, kind: str, content: RecordDict, recipe: str, run: str = RUN) -> str:
        """Return why a request is refused; nothing else is in the reply."""
        fields, reply = deserialize(self.raw(kind, content, recipe, run))
        assert not reply
        assert set(fields) == {"error"}
        return fields["error"]

    def answer(self, kind: str, content: RecordDict, recipe: str, run: str = RUN) -> RecordDict:
        """Return the reply to a request that is answered."""
        fields, reply = deserialize(self.raw(kind, content, recipe, run))
        assert fields == {}
        return reply

    def start(self, recipe: str, run: str = RUN) -> Payload:
        """Return the shared weights of a new run."""
        agreement = json.dumps({"clinic": None})
        assert info_of(self.answer("query.join", records({}), recipe, run))["client"] == "clinic"
        return payload_of(self.answer("query.initial", records({"agreement": agreement}), recipe, run), "clinic")

    def files(self) -> dict[str, bytes]:
        """Return all that the silo keeps, but for its request log, in which every request is a line."""
        kept = sorted(p for p in self.state.rglob("*") if p.is_file() and p.name != "requests.jsonl")
        return {str(p.relative_to(self.state)): p.read_bytes() for p in kept}


def to_train(payload: Payload, number: Any = 1) -> RecordDict:
    """Return a request to train a round."""
    return records({"round": number, "agreement": json.dumps({"clinic": None})}, payload=payload)


def to_evaluate(payload: Payload, number: Any = 1, states: Any = STATES, answers: bool = False) -> RecordDict:
    """Return a request to evaluate."""
    content = to_train(payload, number)
    content.config_records["info"].update({"states": states, "answers": answers})
    return content


def moved(payload: Payload, by: float) -> Payload:
    """Return other weights of the same shapes."""
    return Payload(payload.manifest, payload.vector + by)
