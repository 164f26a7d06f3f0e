"""Names of clients: what can be one, what it becomes, and which two cannot stand in one run."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexperts.config.names import alike, client_name, client_names, file_safe, normal, readings_of
from flexperts.errors import ConfigError, DataError
from flexperts.recipe import load_silo

NAMES = [
    "clinic", "help_desk", "ward-7", "x_y-z.1", "A", "7", "-hidden", "Zürich", "Île-de-France", "Łódź", "Ọ̀ṣun",
    "Больница-3", "Αθήνα", "Երևան", "თბილისი", "ירושלים", "مستشفى", "مستشفى٣", "بیمارستان۴", "हिन्दी", "ঢাকা",
    "சென்னை", "ลำปาง", "ວຽງຈັນ", "ဆေးရုံ", "មន្ទីរ", "東京大学ICU", "さくらクリニック", "センター", "서울ICU",
    "北京", "ᏣᎳᎩ", "Queenʻs", "ໜອງຄາຍ",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_any_script_are_kept_in_nfc(name: str, form: str) -> None:
    given_as = unicodedata.normalize(form, name)
    assert client_name(given_as) == unicodedata.normalize("NFC", name)
    assert client_name(client_name(given_as)) == client_name(given_as)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("сlinic", "LATIN SMALL LETTER L"),  # after a Cyrillic letter
        ("clinіc", "CYRILLIC SMALL LETTER BYELORUSSIAN-UKRAINIAN I"),
        ("Αlpha", "LATIN SMALL LETTER L"),  # after a Greek one
        ("wаrd", "CYRILLIC SMALL LETTER A"),
        ("hοspital", "GREEK SMALL LETTER OMICRON"),
        ("bօston", "ARMENIAN SMALL LETTER OH"),
        ("ᎪBC", "LATIN CAPITAL LETTER B"),  # after a Cherokee one
        ("ward٣", "ARABIC-INDIC DIGIT THREE"),
        ("ward৪", "BENGALI DIGIT FOUR"),
        ("مستشفى٣3", "DIGIT THREE"),
        ("مستشفى٤۴", "EXTENDED ARABIC-INDIC DIGIT FOUR"),
        ("さくらβ", "GREEK SMALL LETTER BETA"),
        ("서울か", "HIRAGANA LETTER KA"),
    ],
)
def test_letters_of_scripts_that_are_not_written_together(name: str, of: str) -> None:
    with pytest.raises(DataError, match=rf"letters and digits are of one script, and '.*' \({of}\)"):
        client_name(name)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("a b", "SPACE"),
        ("a\u00a0b", "NO-BREAK SPACE"),
        ("clinic\u200b", "ZERO WIDTH SPACE"),
        ("cli\u200dnic", "ZERO WIDTH JOINER"),
        ("\ufeffclinic", "ZERO WIDTH NO-BREAK SPACE"),
        ("clinic\u3164", "HANGUL FILLER"),
        ("clinic\ufe0f", "VARIATION SELECTOR-16"),
        ("cli\u00adnic", "SOFT HYPHEN"),
        ("\u202ecinilc", "RIGHT-TO-LEFT OVERRIDE"),
        ("ＩＣＵ", "FULLWIDTH LATIN CAPITAL LETTER I"),
        ("ﬁnance", "LATIN SMALL LIGATURE FI"),
        ("ICU²", "SUPERSCRIPT TWO"),
        ("ⅣA", "ROMAN NUMERAL FOUR"),
        ("𝐜linic", "MATHEMATICAL BOLD SMALL C"),
        ("\u0301a", "COMBINING ACUTE ACCENT"),
        ("a@global", "COMMERCIAL AT"),
        ("*", "ASTERISK"),
        ("a/b", "SOLIDUS"),
        ("a[u]", "LEFT SQUARE BRACKET"),
        ("..", "FULL STOP"),
        ("caf\udce9", "unnamed"),
        ("a\0", "unnamed"),
    ],
)
def test_characters_that_no_name_has_are_told(name: str, of: str) -> None:
    with pytest.raises(DataError, match=rf"a client's name is letters, digits, .*; this one holds '.*' \({of}\)"):
        client_name(name)


def test_bytes_count() -> None:
    assert client_name("東" * 66)
    with pytest.raises(DataError, match="of 201 bytes: a name has at most 200 bytes"):
        client_name("東" * 67)


@given(st.text(max_size=12))
@example("\U00031350")  # a letter of Unicode 15, which Python 3.11 does not know
def test_whatever_is_a_name_is_a_files_name_and_stays_one(text: str) -> None:
    try:
        name = client_name(text)
    except DataError:
        return
    assert name.isprintable()
    assert not set(name) & set("/\\\0@*[]: ")
    assert not name.startswith(".")
    assert client_name(name) == name == normal(text)
    assert file_safe(text) == name


@given(st.text(min_size=1, max_size=12))
def test_an_id_as_a_name_fails_by_its_scripts_alone(text: str) -> None:
    refusals = []
    try:
        client_name(file_safe(text))
    except DataError as error:
        refusals.append(error.rule)
    assert all("of one script" in rule for rule in refusals)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zürich", "Zu\u0308rich"),
        ("clinic", "Clinic"),
        ("STRASSE", "Straße"),
        ("coco", "сосо"),  # all Cyrillic
        ("HOPE", "НОРЕ"),
        ("hope", "НОРЕ"),
        ("AB", "ΑΒ"),  # Greek
        ("8", "৪"),
        ("clinik", "clınık"),
    ],
)
def test_two_that_read_alike_are_not_clients_of_one_run(one: str, other: str) -> None:
    for pair in ((one, other), (other, one), ("shop", one, "bank", other)):
        with pytest.raises(DataError, match="two clients of a run must not read alike") as refused:
            client_names(pair)
        assert ascii(one) in refused.value.value
        assert ascii(other) in refused.value.value
    assert one == other or alike(normal(one), readings_of(["bank", other])) == other


def test_others_are() -> None:
    names = [
        "Zürich",
        "Zurich",
        "ward-1",
        "ward-l",
        "ward-I",
        "ward-0",
        "ward-O",
        "rn",
        "m",
        "Вена",
        "вена2",
        "北京",
    ]
    names.remove("ward-I")  # reads like nothing here but ward-i
    assert client_names(names) == {name: name for name in names}


SILO = 'state = "state"\nbase = "smol-moe"\n[data]\ntrain = "a.csv"\n'


def silo_file(folder: Path, name: str) -> Path:
    path = folder / "silo.toml"
    path.write_text(f'name = "{name}"\n{SILO}', encoding="utf-8")
    return path


def test_a_silos_name_is_a_clients_name(tmp_path: Path) -> None:
    assert load_silo(silo_file(tmp_path, "Zu\u0308rich")).name == "Zürich"


@pytest.mark.parametrize("name", ["ward 7", "сlinic", ".a", "x" * 201, "a\u200b", ""])
def test_a_silos_name_that_is_none_is_refused_likewise(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as rule:
        client_name(name)
    with pytest.raises(ConfigError, match="name = ") as refused:
        load_silo(silo_file(tmp_path, name))
    assert rule.value.rule in str(refused.value)
