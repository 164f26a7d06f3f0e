"""What `engines/flower_private.py` takes from Flower's inside still works as it is used."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE, ErrorCode

from flexperts.deployment.superlink_check import AHEAD, BEHIND
from flexperts.engines.flower_private import Run, assume_identity, empty_run, stamp
from flexperts.engines.grid import InProcessGrid
from flexperts.server.exchange import NODE_UNAVAILABLE


def message(node: int = 7) -> Message:
    return Message(RecordDict({"info": ConfigRecord({"n": node})}), node, "train")


def test_the_version_is_one_that_was_tested() -> None:
    assert version("flwr").startswith(("1.41.", "1.42."))


def test_numbers_that_are_written_down_here_are_flowers() -> None:
    assert NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert (AHEAD, BEHIND) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)


def test_messages_can_be_built_and_stamped() -> None:
    assume_identity(1)
    sent = message()
    assert sent.metadata.message_id == ""
    assert stamp(sent) == sent.metadata.message_id != ""
    reply = Message(RecordDict(), reply_to=sent)
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id
    assert reply.metadata.src_node_id == 7


def test_run_information_is_empty_but_for_its_id() -> None:
    assert isinstance(empty_run(5), Run)
    assert empty_run(5).run_id == 5


@pytest.fixture
def grid() -> InProcessGrid:
    def answer(name: str, kind: str, content: RecordDict) -> RecordDict:
        calls.append(name)
        return RecordDict({"info": ConfigRecord({"client": name})})

    calls: list[object] = []
    made = InProcessGrid({2: partial(answer, "b"), 1: partial(answer, "a")})
    made.calls = calls  # type: ignore[attr-defined]
    return made


def test_replies_come_lazily_and_in_order(grid: InProcessGrid) -> None:
    calls = grid.calls  # type: ignore[attr-defined]
    replies = grid.send_and_receive([grid.create_message(RecordDict(), "train", n, "1") for n in (1, 2)])
    assert calls == []
    next(iter(replies))
    assert calls == ["a"]


def test_pushed_messages_are_pulled_sorted_by_node_and_once(grid: InProcessGrid) -> None:
    ids = list(grid.push_messages([grid.create_message(RecordDict(), "train", n, "1") for n in (2, 1)]))
    assert [m.content.config_records["info"]["client"] for m in grid.pull_messages(ids)] == ["a", "b"]
    assert list(grid.pull_messages(ids)) == []


def test_the_grid_knows_its_nodes_and_run(grid: InProcessGrid) -> None:
    assert list(grid.get_node_ids()) == [1, 2]
    grid.set_run(empty_run(9))
    assert grid.run.run_id == 9
