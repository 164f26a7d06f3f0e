"""A run's models: answers as the run gives them, folders, and the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

import flexperts
from flexperts import FlexpertsError, PersonalModel, Run, federate
from flexperts.errors import ArtifactError, ConfigError, PrivacyError
from flexperts.export import exporting
from flexperts.finished.trained import TrainedRun

ASKED = [{"instruction": "Name item 3.", "context": "It is brown."}, "Name item 3.", "Count the items, please."]


def rows(word: str) -> list[dict[str, str]]:
    return [{"instruction": f"Name item {i}.", "response": f"{word} {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return federate(
        {"base": str(tiny_base), "dtype": "float32", "precision": "fp32"},
        {"clinic": rows("ox"), "shop": rows("ant")},
        rounds=1,
        out=tmp_path_factory.mktemp("runs") / "run",
        progress=False,
        training={"max_length": 128, "lr": 0.05, "personal_lr": 0.3},
        evaluation={"max_new_tokens": 6},
    )


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported folders are not checked once more: tests/export has these checks."""
    monkeypatch.setattr(exporting, "_checked", lambda *_: None)


def test_answers_are_those_of_the_run(run: Run) -> None:
    model = run.model("clinic")
    one = [run._trained.generate("clinic", "Name item 3.", context) for context in ("It is brown.", "")]
    assert model.generate(ASKED[:2], batch_size=1) == one
    assert model.generate(ASKED, max_new_tokens=2)[1].tokens <= 2
    assert model.chat([{"role": "user", "content": "Name item 3."}]) == one[1]
    assert model.generate([]) == []
    states = {state: run.model("clinic", state).generate(ASKED[1:2]) for state in ("zero_shot", "personalized")}
    assert states["personalized"] == one[1:]
    assert states["zero_shot"] != one[1:]


def test_a_batch_answers_as_one_at_a_time(run: Run) -> None:
    model = run.model("shop")
    assert model.generate(ASKED * 2, batch_size=4) == [model.generate([its])[0] for its in ASKED * 2]


def test_a_conversation_has_several_turns(run: Run) -> None:
    model = run.model("clinic")
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    turns.append({"role": "user", "content": "Name item 3."})
    assert model.encode(turns) == run._trained.workspace.encoder.conversation(turns)
    assert [model.chat(turns)] == model.generate([turns])


def test_the_torch_model_is_the_clients(run: Run) -> None:
    model = run.model("clinic")
    tokens = model.encode(ASKED[1])
    with model.in_use() as network, torch.no_grad():
        first = int(network(torch.tensor([tokens])).logits[0, -1].argmax())
    [answer] = model.generate(ASKED[1:2], max_new_tokens=1)
    encoder = run._trained.workspace.encoder
    assert answer == encoder.tokenizer.decode([first], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("Name it.", "they are a list"),
        ({"instruction": "Name it."}, "they are a list"),
        ([{"question": "a secret"}], "prompt 1: a row has a text `instruction`"),
        ([{"instruction": "x", "context": 7}], "prompt 1"),
        ([3], "prompt 1: it is an instruction, a row, or a list of messages"),
        (["x", [{"role": "user"}]], "prompt 2"),
        ([[{"role": "doctor", "content": "a secret"}]], "roles are system, user and assistant"),
        ([[{"role": "assistant", "content": "a secret"}]], "the last message is the user's"),
        ([[{"role": "user", "content": 7}]], "prompt 1"),
        (["x" * 2000], "the base reads at most 1024"),
    ],
)
def test_other_prompts_are_refused(prompts: Any, told: str, run: Run) -> None:
    with pytest.raises(FlexpertsError, match=told) as caught:
        run.model("clinic").generate(prompts)
    assert "secret" not in str(caught.value)


def test_limits_below_one_are_refused(run: Run) -> None:
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} = 0"):
            run.model("clinic").generate(["x"], **{name: 0})


def test_clients_and_states_are_checked_before_the_base_loads(run: Run) -> None:
    fresh = Run(run.path)
    with pytest.raises(ConfigError, match="the run's clients are clinic, shop"):
        fresh.model("clinik")
    with pytest.raises(ConfigError, match="zero_shot, global, personalized"):
        fresh.model("clinic", "best")
    assert "_trained" not in vars(fresh)


def test_they_say_what_they_are(run: Run, tiny_base: Path) -> None:
    assert repr(run) == f"Run({str(run.path)!r}: flex on {tiny_base.name}, 1 round; clients clinic, shop)"
    assert repr(run.model("shop")) == f"PersonalModel('shop', personalized, of {run.path})"
    assert run.scores["nll"]["clinic"].keys() == {"zero_shot", "global", "personalized"}
    assert run.scores["rouge_l"].keys() == {"clinic", "shop"}


def test_a_run_is_closed_and_opens_again(run: Run) -> None:
    with Run(str(run.path)) as other:
        answer = other.model("clinic").generate(ASKED[1:2])
        model = other._trained.model
    assert "_trained" not in vars(other)
    assert model.base.model.get_submodule("model.layers.0.self_attn.q_proj").__class__ is torch.nn.Linear
    assert other.model("clinic").generate(ASKED[1:2]) == answer == run.model("clinic").generate(ASKED[1:2])


def test_a_model_is_loaded_from_a_run_directory(run: Run) -> None:
    with PersonalModel.from_pretrained(run.path, "clinic") as model:
        assert (model.client, model.state) == ("clinic", "personalized")
        assert model.generate(ASKED[1:2]) == run.model("clinic").generate(ASKED[1:2])
    with pytest.raises(ConfigError, match="a run has a model for each client"):
        PersonalModel.from_pretrained(run.path)


@pytest.mark.parametrize("state", ["global", "personalized"])
def test_a_saved_model_answers_alike_without_the_run(run: Run, state: str, tiny_base: Path, tmp_path: Path) -> None:
    model = run.model("clinic", state)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "personal.json").exists() is (state == "personalized")
    with PersonalModel.from_pretrained(tmp_path / "saved", base=tiny_base, dtype="float32") as saved:
        assert saved.generate(ASKED, max_new_tokens=6) == model.generate(ASKED)
        saved.save_pretrained(tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {p.name for p in (tmp_path / "saved").iterdir()}


def test_a_whole_model_answers_alike(run: Run, tmp_path: Path) -> None:
    model = run.model("clinic", "global")
    model.save_pretrained(tmp_path / "merged", form="merged")
    saved = PersonalModel.from_pretrained(tmp_path / "merged")
    assert saved.client == "merged"
    assert saved.generate(ASKED, max_new_tokens=6) == model.generate(ASKED)


def test_a_saved_model_is_refused_on_another_base(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    run.model("clinic").save_pretrained(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="the model's own base is needed"):
        PersonalModel.from_pretrained(tmp_path / "saved", base=tiny_base, dtype="bfloat16")
    with pytest.raises(ConfigError, match="holds one model, clinic, personalized"):
        PersonalModel.from_pretrained(tmp_path / "saved", "shop", base=tiny_base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="neither a run nor an exported model"):
        PersonalModel.from_pretrained(tmp_path / "empty")


class Hub:
    """The hub as far as push_to_hub uses it."""

    def __init__(self, *, public: bool = False) -> None:
        self.public, self.sent = public, dict[str, bytes]()

    def __call__(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        self.private = private and not self.public
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        self.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"


def test_a_pushed_model_is_private_and_holds_no_rows(
    run: Run, tiny_base: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub())
    model = run.model("clinic")
    assert model.push_to_hub("ours", token="t") == "https://hub/me/ours"
    assert (hub.private, hub.token) == (True, "t")
    printed = capsys.readouterr().out
    assert "sending clinic's model to ours (private)" in printed
    assert all(name in printed for name in hub.sent)
    everything = b"".join(hub.sent.values())
    assert b"Name item" not in everything
    assert b"shop" not in everything
    assert str(run.path).encode() not in everything

    (stored := tmp_path / "stored").mkdir()
    for name, content in hub.sent.items():
        (stored / name).write_bytes(content)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(stored))
    loaded = PersonalModel.from_pretrained("me/ours", base=tiny_base)
    assert loaded.client == "clinic"
    assert loaded.generate(ASKED, max_new_tokens=6) == model.generate(ASKED)


def test_a_public_repository_is_refused_unless_it_is_asked_for(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", hub := Hub(public=True))
    with pytest.raises(PrivacyError, match="exists and is public"):
        run.model("clinic").push_to_hub("ours")
    assert not hub.sent
    assert run.model("clinic").push_to_hub("ours", private=False)


def test_errors_of_the_hub_are_ours(run: Run, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no \x1b[31mnetwork")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: SimpleNamespace(create_repo=fail))
    with pytest.raises(ArtifactError, match="cannot be uploaded") as caught:
        run.model("clinic").push_to_hub("ours")
    assert "\x1b" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ArtifactError, match="the hub does not give it"):
        PersonalModel.from_pretrained("me/ours")


def test_the_older_name_still_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"use flexperts.Run"):
        assert flexperts.TrainedRun is TrainedRun
