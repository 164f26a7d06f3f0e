"""Whether the clients' stored states belong to the round from which a run is taken up."""

from __future__ import annotations

from flexperts.artifacts import RunDirectory
from flexperts.errors import ArtifactError
from flexperts.methods.server import Server
from flexperts.parameters.store import PersonalStore


def check_states(run: RunDirectory, server: Server, base: str) -> None:
    """Refuse a client's state that is older than its last round, as after the newest file was deleted.

    A client whose update was refused has a newer state than the server knows of, and keeps it.

    Args:
        run: A run with all its clients in one process.
        server: Its checkpoint.
        base: The base's fingerprint.

    Raises:
        ArtifactError: A state is missing, too old, damaged, or of another base; or rounds are damaged.
    """
    trained = {name: log["number"] for log in run.finished_rounds(server.round) for name in log["clients"]}
    for name, last in sorted(trained.items()):
        store = PersonalStore(run.path / "personal" / f"{name}.safetensors", base)
        state = store.load(server.round)
        if state is None or state[1].round < last:
            found = "missing" if state is None else f"of round {state[1].round}"
            raise ArtifactError(
                f"the newest state of {name} in {store.path.parent} is {found}",
                f"{name} last trained in round {last}",
                "restore it from a copy, or start a new run",
            )
