"""What a silo's file may say, what a server hands out, and what a silo makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from flexperts.config.run import RunConfig
from flexperts.config.silo import SiloConfig
from flexperts.data.clients import load_clients
from flexperts.deployment.relay import _silo
from flexperts.deployment.settings import at_silos, for_silo
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import load_silo, parse_recipe

Recipe = Callable[..., RunConfig]
SILO = 'name = "a"\nstate = "state"\nbase = "smol-moe"\n[data]\ntrain = "rows/train.csv"\n'


def written(folder: Path, text: str) -> Path:
    (folder / "silo.toml").write_text(text, encoding="utf-8")
    return folder / "silo.toml"


def test_paths_of_a_silo_are_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    silo = load_silo(written(tmp_path, SILO.replace("smol-moe", "weights") + 'test = "hub:org/set:test"'))
    assert (silo.state, silo.base) == (str(tmp_path / "state"), str(tmp_path / "weights"))
    assert (silo.data.train, silo.data.test) == (str(tmp_path / "rows/train.csv"), "hub:org/set:test")
    assert not silo.trust_remote_code
    assert load_silo(written(tmp_path, SILO)).base == "smol-moe"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name = ", "nmae = "), "did you mean 'name'"),
        (("train = ", "trian = "), "did you mean 'data.train'"),
        (('"a"', '"../a"'), "name = '../a'"),
        (('"a"', '"a\\n"'), "name = 'a\\n'"),
        (('"a"', '".hidden"'), "name = '.hidden'"),
        (('"a"', f'"{"a" * 201}"'), "name = "),
        (("[data]", "device = 3\n[data]"), "device = 3"),
        (("[data]", "[data]\ncolumns = {answer = 'x'}"), "columns maps ['answer']"),
        (("[data]", "[data"), "not valid TOML"),
        ((SILO, ""), "name: Field required"),
    ],
)
def test_a_wrong_silo_file_is_refused_with_the_key_named(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_silo(written(tmp_path, SILO.replace(*change)))
    assert said in str(caught.value)
    assert "silo.toml" in str(caught.value)


def test_a_missing_silo_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such silo file"):
        load_silo(tmp_path / "none.toml")


def test_a_recipe_at_silos_has_no_rows_here(recipe: Recipe) -> None:
    config = parse_recipe("data.at_silos = true")
    with pytest.raises(DataError, match="the silos read their own rows"):
        load_clients(config.data, 0)
    with pytest.raises(ConfigError, match="exactly one of"):
        recipe("data.at_silos=true")


def test_what_is_handed_out_names_no_path_and_no_device(recipe: Recipe, silos: Path) -> None:
    own = (f"data={{folder = '{silos}', test_fraction = 0.3, validation_fraction = 0.2}}", "model.device=cpu")
    handed = at_silos(recipe(*own, "method.reference=fedavg", "data.columns={context = 'about'}"))
    assert str(silos) not in handed.to_toml()
    assert handed.data.at_silos
    assert (handed.data.folder, handed.data.columns) == (None, {})
    assert (handed.data.test_fraction, handed.data.validation_fraction) == (0.3, 0.2)
    assert (handed.model.device, handed.method.reference) == ("auto", None)
    assert parse_recipe(handed.to_toml()).data == handed.data
    assert at_silos(handed).to_toml() == handed.to_toml()


@pytest.mark.parametrize(
    "override",
    ["evaluation.others_rows=3", "knowledge.general=tasks.jsonl", "knowledge.mmlu=hub", "method.name=centralized"],
)
def test_what_needs_all_rows_in_one_process_is_not_handed_out(recipe: Recipe, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match="leave it out") as caught:
        at_silos(recipe(override))
    assert key in caught.value.value
    assert value in caught.value.value


def test_a_silo_takes_nothing_of_its_own_from_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    theirs = recipe(
        "data={folder = '/etc', columns = {context = 'shadow'}, validation_fraction = 0.2}",
        "model.base=/srv/weights",
        "model.device=cuda:7",
        "model.trust_remote_code=true",
        "knowledge.mmlu=/etc/mmlu",
    )
    silo = load_silo(written(tmp_path, SILO + 'columns = {response = "reply"}'))
    mine = for_silo(theirs, silo)
    assert mine.data.model_dump(exclude_defaults=True) == {
        "clients": {
            "a": {
                "train": str(tmp_path / "rows/train.csv"),
                "columns": {"response": "reply"},
                "format": "auto",
                "on_bad_row": "refuse",
            }
        },
        "validation_fraction": 0.2,
    }
    assert (mine.model.base, mine.model.device, mine.knowledge.mmlu) == ("smol-moe", "auto", None)
    assert not mine.model.trust_remote_code
    trusting = silo.model_copy(update={"trust_remote_code": True})
    assert for_silo(recipe(), trusting).model.trust_remote_code
    assert (mine.model.dtype, mine.training, mine.seed) == (theirs.model.dtype, theirs.training, theirs.seed)


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_silos_file_may_start_with_a_byte_order_mark(tmp_path: Path, mark: str) -> None:
    path = written(tmp_path, mark + SILO)
    assert load_silo(path).name == "a"
    context = Context(0, 0, {"silo": str(path)}, RecordDict(), {})
    assert _silo(context) == ("a", tmp_path / "state")


def test_links_to_a_silos_rows_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").symlink_to(tmp_path / "blob")
    assert load_silo(written(tmp_path, SILO)).data.train == str(tmp_path / "rows" / "train.csv")


@pytest.mark.parametrize("theirs", ["refuse", "drop"])
@pytest.mark.parametrize("own", [None, "refuse", "drop"])
def test_a_silo_says_itself_what_becomes_of_bad_rows(
    recipe: Recipe, tmp_path: Path, theirs: str, own: str | None
) -> None:
    silo = load_silo(written(tmp_path, SILO + (f'on_bad_row = "{own}"' if own else "")))
    handed = recipe(f"data={{folder = '/x', on_bad_row = '{theirs}'}}")
    assert for_silo(at_silos(handed), silo).data.of_client("a").on_bad_row == (own or "refuse")
    assert for_silo(handed, silo).data.of_client("a").on_bad_row == (own or "refuse")


def test_silo_settings_are_frozen(tmp_path: Path) -> None:
    silo: SiloConfig = load_silo(written(tmp_path, SILO))
    with pytest.raises(ValueError, match="frozen"):
        silo.name = "b"  # type: ignore[misc]
