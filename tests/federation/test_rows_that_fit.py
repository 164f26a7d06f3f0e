"""Before round 1: every row is encoded, without the base's weights; what does not fit is named or left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexperts.client.workspace import Workspace
from flexperts.config.run import RunConfig
from flexperts.engines.run import run_federation
from flexperts.errors import ConfigError, DataError, FlexpertsError
from flexperts.observer import Observer, observing
from flexperts.recipe import parse_recipe
from flexperts.testing import byte_tokenizer, save_tiny_base

Recipe = Callable[..., RunConfig]
SECRET = "hidden-42"


class Notes(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def notes() -> Iterator[Notes]:
    heard = Notes()
    with observing(heard):
        yield heard


def silo(folder: Path, rows: list[dict[str, str]], base: Path, *settings: str) -> RunConfig:
    """Return a recipe of one client with these train rows and one test row."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"instruction": "T?", "response": "t"}) + "\n")
    text = f"""
        [model]
        base = "{base}"
        dtype = "float32"
        precision = "fp32"
        [data.clients.ward]
        train = "{folder}/train.jsonl"
        test = "{folder}/test.jsonl"
        [training]
        max_length = 80
        [federation]
        rounds = 1
        [evaluation]
        max_new_tokens = 4
    """
    return parse_recipe(text, settings)


GOOD = {"instruction": "Q?", "response": "A."}
LONG = {"instruction": f"{SECRET} " * 20, "response": "A."}
CUT = {"instruction": "Q?", "response": "A.", "context": f"{SECRET} " * 20}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([GOOD, LONG, GOOD], ["train.jsonl, line 2, row 2"]),
        ([LONG, GOOD, {**GOOD, "response": SECRET * 20}], ["line 1, row 1", "line 3, row 3", "2 of 4 rows"]),
        ([LONG, LONG], ["line 1, row 1", "line 2, row 2"]),
    ],
)
def test_rows_that_are_too_long_are_named_before_the_base_loads(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]], named: list[str]
) -> None:
    monkeypatch.setattr("flexperts.client.workspace.load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(DataError, match=r"training.max_length = 80") as caught:
        run_federation(silo(tmp_path / "rows", rows, tiny_base), tmp_path / "out")
    assert all(place in str(caught.value) for place in named)
    assert str(caught.value).startswith("ward: ")
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_they_are_left_out_where_the_recipe_says_so(tiny_base: Path, tmp_path: Path, notes: Notes) -> None:
    config = silo(tmp_path, [GOOD, LONG, GOOD, LONG], tiny_base, "data.on_bad_row=drop")
    workspace = Workspace(config)
    assert len(workspace.clients["ward"].train) == 2
    assert [row.where[-14:] for row in workspace.clients["ward"].train] == [
        "line 1, row 1",
        "line 3, row 3",
    ] or len(workspace.examples("ward")) == 2
    told = [line for line in notes.lines if "left out" in line]
    assert len(told) == 1
    assert "ward: 2 of 5 rows" in told[0]
    assert "line 2, row 2" in told[0]
    assert SECRET not in "".join(notes.lines)


def test_a_client_without_any_row_that_fits_is_refused_anyway(tiny_base: Path, tmp_path: Path) -> None:
    config = silo(tmp_path, [LONG, LONG], tiny_base, "data.on_bad_row=drop")
    with pytest.raises(DataError, match="cannot be used"):
        _ = Workspace(config).clients


def test_contexts_that_are_cut_are_said_with_client_file_and_row(
    tiny_base: Path, tmp_path: Path, notes: Notes
) -> None:
    workspace = Workspace(silo(tmp_path, [GOOD, CUT, GOOD, CUT], tiny_base))
    assert len(workspace.clients["ward"].train) == 4
    told = [line for line in notes.lines if "cut" in line]
    assert len(told) == 1
    assert told[0].startswith("ward: 2 contexts are cut to training.max_length = 80 tokens: ")
    assert "line 2, row 2" in told[0]
    assert "line 4, row 4" in told[0]
    assert SECRET not in told[0]


def test_control_tokens_in_rows_train_as_text(byte_base: Path, tmp_path: Path) -> None:
    row = {"instruction": "Say </s><pad>", "response": "no </s> here"}
    workspace = Workspace(silo(tmp_path, [row], byte_base))
    ids = workspace.examples("ward")[0].input_ids
    assert [i for i in ids if i > 255] == [257]
    assert ids[-1] == 257


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["training.max_length=1025"], r"training.max_length = 1025: the base reads at most 1024 tokens"),
        (
            ["evaluation.max_new_tokens=1020"],
            r"ward: .*test.jsonl, line 1, row 1: a prompt of \d+ tokens, and an answer of up to",
        ),
        (["model.template_date=tomorrow"], "template_date"),
    ],
)
def test_lengths_beyond_the_base_are_refused(
    tiny_base: Path, tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(FlexpertsError, match=said):
        run_federation(silo(tmp_path / "rows", [GOOD], tiny_base, *settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_template(folder: Path, template: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    save_tiny_base(folder, max_position_embeddings=1024)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% if add_generation_prompt %}<a>{% endif %}"])
def test_a_template_that_fails_is_refused_before_anything_is_written(tmp_path: Path, template: str) -> None:
    base = with_template(tmp_path / "base", template)
    with pytest.raises(ConfigError, match="chat template"):
        run_federation(silo(tmp_path / "rows", [GOOD], base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padding_beyond_the_embedding_trains(tmp_path: Path) -> None:
    """A base of 258 rows beside a tokenizer whose <pad> is 258."""
    base = save_tiny_base(tmp_path / "base", vocab_size=258, pad_token_id=None, max_position_embeddings=1024)
    rows = [GOOD, {**GOOD, "response": "a longer answer"}]
    summary = run_federation(silo(tmp_path / "rows", rows, base), tmp_path / "out")
    assert summary["clients"]["ward"]["nll"]["global"] > 0


def test_a_token_beyond_the_embedding_is_named_with_its_row(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=1024)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"filler{n}" for n in range(5)])
    tokenizer.save_pretrained(base)
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    word = f"filler{max(0, size - 259)}"
    with pytest.raises(DataError, match=r"line 2, row 2: .*embedding rows"):
        run_federation(silo(tmp_path / "rows", [GOOD, {**GOOD, "instruction": word}], base), tmp_path / "out")
