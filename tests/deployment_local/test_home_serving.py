"""A silo's own model served at home, through the same engine as a whole run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import RecordDict

from flexperts.cli.main import main
from flexperts.communication.wire import deserialize, serialize
from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.deployment.home import HomeModel, HomeRun
from flexperts.deployment.state import make_private
from flexperts.deployment.worker import Worker
from flexperts.errors import ArtifactError
from flexperts.serving.contract import Piece, Sampling, find_model
from flexperts.serving.engine.engine import ServingEngine

from .asking import RUN, converse


@pytest.fixture
def kept(silo: SiloConfig, handed: Callable[..., RunConfig]) -> SiloConfig:
    """A silo that has taken part in one round of a run."""
    make_private(Path(silo.state))
    worker = Worker(silo)
    recipe = handed(
        "training.local_steps=8", "training.lr=0.3", "training.personal_lr=0.5", "evaluation.rows=1"
    ).to_toml()

    def ask(kind: str, content: RecordDict) -> RecordDict:
        return deserialize(worker.reply(serialize({"run": RUN, "kind": kind, "recipe": recipe}, content)))[1]

    converse(ask)
    return silo


def answer(engine: ServingEngine, model: str) -> str:
    prompt = engine.prompt_tokens([{"role": "user", "content": "Summarise the letter."}])
    pieces: list[Piece] = []
    ended = threading.Event()

    def heard(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish:
            ended.set()

    engine.submit(find_model(model, engine.models), prompt, Sampling(4), heard)
    assert ended.wait(60)
    assert pieces[-1].finish in ("stop", "length")
    return "".join(piece.text for piece in pieces)


def test_the_silos_models_answer_as_at_home(kept: SiloConfig) -> None:
    home = HomeModel(kept, RUN)
    wanted = [home.generate("Summarise the letter.", state=state) for state in home.method.states]
    engine = ServingEngine(HomeRun(kept, RUN))
    assert [str(model) for model in engine.models] == ["clinic@zero_shot", "clinic@global", "clinic"]
    assert [answer(engine, str(model)) for model in engine.models] == wanted
    engine.close()
    assert wanted[1] != wanted[2], "they say the same, so they could be mixed up"


def test_the_silos_models_need_no_rows(kept: SiloConfig) -> None:
    wanted = HomeModel(kept, RUN).generate("Summarise the letter.")
    data = kept.data.model_copy(update={"train": "/nowhere/train.jsonl", "test": None})
    assert HomeModel(kept.model_copy(update={"data": data}), RUN).generate("Summarise the letter.") == wanted


def test_a_run_that_the_silo_does_not_keep_is_refused(silo: SiloConfig) -> None:
    with pytest.raises(ArtifactError, match="has not yet received its final shared weights"):
        HomeRun(silo, RUN)


@pytest.mark.parametrize("tokens", [1, 9])
def test_generate_at_home_marks_an_answer_that_was_cut(
    kept: SiloConfig,
    silo_file: Path,
    tokens: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = HomeModel(kept, RUN).generate("Hello", max_new_tokens=tokens)
    command = ["flexperts", "silo", "generate", str(silo_file), RUN, "Hello", "--max-tokens", str(tokens)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    printed, said = capsys.readouterr()
    assert printed == f"{expected}\n"
    assert expected.tokens <= tokens
    assert said == (f"[cut at {tokens} tokens; --max-tokens N allows a longer answer]\n" if expected.cut else "")
    assert expected.cut or tokens > 1
