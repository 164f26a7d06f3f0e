"""Files of keys: what is kept, what is refused, what is never told."""

from __future__ import annotations

import hashlib
import os
import tomllib
from pathlib import Path

import pytest

from flexperts.errors import ConfigError, FlexpertsError
from flexperts.serving.http.keys import OPERATOR, KeyRing, hash_of, load_keys, make_keys, may_call

CLIENTS = ["clinic", "shop"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def test_made_keys_open_what_they_are_for(path: Path) -> None:
    made = make_keys(path, CLIENTS)
    assert list(made) == [OPERATOR, "clinic", "shop"]
    assert len(set(made.values())) == 3
    ring = load_keys(path, CLIENTS)
    assert {key: ring.owner(key) for key in made.values()} == {key: owner for owner, key in made.items()}
    assert ring.owner("fx-nobodys") is None


def test_the_file_holds_hashes_for_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_keys(path, CLIENTS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert not [key for key in made.values() if key in text or key.removeprefix("fx-") in text]
    digest = hashlib.sha256(made["shop"].encode()).hexdigest()
    assert tomllib.loads(text)["keys"]["shop"] == [f"sha256:{digest}"]
    assert os.umask(before) == before


def test_a_file_of_keys_may_start_with_a_byte_order_mark(path: Path) -> None:
    made = make_keys(path, CLIENTS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_keys(path, CLIENTS).owner(made["shop"]) == "shop"


def test_an_owner_is_found_in_any_form_of_unicode(path: Path) -> None:
    digest = hash_of("fx-1")
    written(path, f'[keys]\n"Zu\u0308rich" = ["{digest}"]\n')
    assert load_keys(path, ["Zürich"]).owner("fx-1") == "Zürich"
    assert list(make_keys(path, ["Zürich"])) == [OPERATOR]
    written(path, f'[keys]\n"Zu\u0308rich" = ["{digest}"]\n"Zürich" = []\n')
    with pytest.raises(ConfigError, match="it names one owner twice"):
        load_keys(path, ["Zürich"])


def test_who_has_a_key_keeps_it(path: Path) -> None:
    old = make_keys(path, ["clinic"])
    new = make_keys(path, CLIENTS)
    assert list(new) == ["shop"]
    ring = load_keys(path, CLIENTS)
    assert [ring.owner(key) for key in (*old.values(), *new.values())] == [OPERATOR, "clinic", "shop"]
    assert make_keys(path, CLIENTS) == {}


def test_a_client_may_have_several_keys_and_none(path: Path) -> None:
    ring = KeyRing({"clinic": [hash_of("a"), hash_of("b")], "shop": []})
    assert [ring.owner(key) for key in ("a", "b", "c", "")] == ["clinic", "clinic", None, None]
    assert list(make_keys(written(path, "[keys]\nclinic = []"), CLIENTS)) == [OPERATOR, "clinic", "shop"]


def test_who_may_call_what() -> None:
    assert may_call("clinic", "clinic")
    assert may_call(OPERATOR, "clinic")
    assert not may_call("clinic", "shop")
    assert not may_call("clinic", "clinic2")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "one table"),
        ("keys = 5", "one table"),
        ("[keys]\n[other]", "one table"),
        ("[keys", "not valid TOML"),
        ("[keys]\nnobody = []", "the run's clients are clinic, shop"),
        ("[keys]\nclinic = 'fx-pasted'", "a list of hashes"),
        ("[keys]\nclinic = ['fx-pasted']", "a list of hashes"),
        ("[keys]\nclinic = ['sha256:12']", "a list of hashes"),
        ("[keys]\nclinic = [5]", "a list of hashes"),
    ],
)
def test_a_file_that_is_none_is_refused(path: Path, text: str, told: str) -> None:
    written(path, text)
    for use in (load_keys, make_keys):
        with pytest.raises(ConfigError, match=told) as caught:
            use(path, CLIENTS)
        assert "fx-pasted" not in str(caught.value), "a pasted key is repeated"
    assert path.read_text() == text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o601])
def test_a_file_that_others_reach_is_refused(path: Path, mode: int) -> None:
    make_keys(path, CLIENTS)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(path, CLIENTS)


def test_a_file_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(FlexpertsError):
        load_keys(path, CLIENTS)
