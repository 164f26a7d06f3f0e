"""The engine with worker processes, on this machine or on Ray: clients take turns side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message

from flexperts.artifacts import RunDirectory
from flexperts.client.answer import answer
from flexperts.client.answer_limit import scored_rows
from flexperts.client.client import Resident
from flexperts.client.workspace import Workspace
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.data.clients import rows_hash
from flexperts.data.rows import ClientRows
from flexperts.engines.engine import Engine, prepare
from flexperts.engines.grid import LocalGrid, reply_to
from flexperts.engines.pool import Call, Pool
from flexperts.engines.ray import Actors
from flexperts.evaluation.scores import EvaluationSettings, Scores
from flexperts.modeling.memory import peak_bytes, reset_peak
from flexperts.server.exchange import LazyGrid

_Untouched = dict[tuple[str, int, str, EvaluationSettings], Scores]


class Workers(Engine):
    """Clients take turns in worker processes, and this process never loads the base; see ``Engine``.

    Args:
        workspace: The rows.
        pool: The workers.
    """

    def __init__(self, workspace: Workspace, pool: Pool | Actors) -> None:
        super().__init__(workspace, pool.setting.threads)
        self.workers, self._pool = pool.count, pool
        self._grid: _WorkerGrid | None = None

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def prepare(self, config: RunConfig, *, needs_experts: bool) -> str:
        """See ``Engine``."""
        [fingerprint] = self._pool.results([Call("the base", prepare, (config, needs_experts))])
        return str(fingerprint)

    @contextmanager
    def grid(self, config: RunConfig, run: RunDirectory) -> Iterator[LazyGrid]:
        """See ``Engine``."""
        self._grid = _WorkerGrid(self._pool, self.workspace, config, run.path)
        yield self._grid

    @property
    def peak(self) -> int | None:
        """See ``Engine``."""
        return None if self._grid is None else self._grid.peak


class _WorkerGrid(LocalGrid):
    """The clients of a run in worker processes; any worker takes any client's turn, as all state is on disk.

    Args:
        pool: The workers.
        workspace: The rows, and what is known of the untouched base.
        config: The run.
        folder: Its directory.
    """

    def __init__(self, pool: Pool | Actors, workspace: Workspace, config: RunConfig, folder: Path) -> None:
        self._names = dict(enumerate(workspace.clients, 1))
        super().__init__(self._names)
        self._pool, self._workspace, self._config, self._folder = pool, workspace, config, folder.resolve()
        self.peak: int | None = None

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies to messages in their order; each message is taken when a worker is free for it."""
        asked: deque[Message] = deque()

        def calls() -> Iterator[Call]:
            for message in messages:
                asked.append(message)
                yield self._call(message)

        for reply, found, peak in self._pool.results(calls()):
            self._workspace.untouched.scores.update(found)
            self.peak = max(self.peak or 0, peak) if peak else self.peak
            yield reply_to(asked.popleft(), deserialize(reply)[1])

    def _call(self, message: Message) -> Call:
        kind, name = message.metadata.message_type, self._names[message.metadata.dst_node_id]
        rows = rows_hash(ClientRows((), scored_rows(self._workspace.clients[name], self._config.evaluation)))
        known = {key: its for key, its in self._workspace.untouched.scores.items() if key[0] == rows}
        content = serialize({}, message.content)
        return Call(f"{name}, {kind}", _take_turn, (self._config, self._folder, name, kind, content, known))


_resident: Resident | None = None
"""In a worker: the run whose clients it serves now."""


def _take_turn(
    workspace: Workspace, config: RunConfig, folder: Path, name: str, kind: str, content: bytes, known: _Untouched
) -> tuple[bytes, _Untouched, int | None]:
    """Answer a request in a worker; return the reply, new scores of the untouched base, and the peak memory."""
    global _resident
    if _resident is None or _resident.folder != folder:
        if _resident is not None:
            _resident.model.close()
        _resident = Resident(workspace, config, folder)
        reset_peak(_resident.model.device)
    scores = workspace.untouched.scores
    scores.update(known)
    before = set(scores)
    reply = serialize({}, answer(kind, deserialize(content)[1], _resident.client(name)))
    found = {key: its for key, its in scores.items() if key not in before}
    return reply, found, peak_bytes(_resident.model.device)
