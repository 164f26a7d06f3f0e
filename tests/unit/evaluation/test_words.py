"""Words of any script: what is a unit, what is folded, and that English stays as rouge-score has it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from flexperts.evaluation.scores import rouge_l
from flexperts.evaluation.words import TOKENIZER, UnicodeWords

RESULTS = Path(__file__).parents[3] / "docs" / "results"
words = UnicodeWords().tokenize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("COVID患者10人", ["covid", "患", "者", "10", "人"]),
        ("ビール々〇", ["ビ", "ー", "ル", "々", "〇"]),
        ("ผู้ป่วย ๑๒ เม็ด", ["ผู้", "ป่", "ว", "ย", "๑๒", "เ", "ม็", "ด"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ភាសាខ្មែរ", ["ភា", "សា", "ខ្មែ", "រ"]),
        ("བོད་ཡིག", ["བོ", "ད", "ཡི", "ག"]),
        ("ꆈꌠ ꦗꦮ", ["ꆈ", "ꌠ", "ꦗ", "ꦮ"]),
        ("환자는 매일", ["환자는", "매일"]),
        ("कृपया दवा लें।", ["कृपया", "दवा", "लें"]),
        ("يأخذ الدواء؟", ["يأخذ", "الدواء"]),
        ("שָׁלוֹם עולם", [unicodedata.normalize("NFC", "שָׁלוֹם"), "עולם"]),
        ("Пациент, 5 мг", ["пациент", "5", "мг"]),
        ("don’t l’eau can't", ["don", "t", "l", "eau", "can", "t"]),
        ("m² 1️⃣ 👍🏽 x_y", ["m²", "1", "x", "y"]),
        ("a\u200bb", ["a", "b"]),
        ("\u0301 ́ -", []),
        ("", []),
    ],
)
def test_units_by_hand(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("ὈΔΥΣΣΕΎΣ", "ὀδυσσεύς"),
        ("İzmir", "izmir"),
        ("ЁЛКА", "ёлка"),
        ("Blut\u00addruck", "Blutdruck"),
        ("می\u200cخواهم", "میخواهم"),
        ("क\u094d\u200dष", "क\u094dष"),
        ("\u2067שלום\u2069", "שלום"),
        ("１０人 ＡＢＣ", "10人 abc"),
        ("ｶﾞｽ", "ガス"),
        ("ﬁne", "fine"),
        ("葛\U000e0100", "葛"),
        ("Å\u212b", "åå"),
    ],
)
def test_what_looks_alike_is_alike(one: str, other: str) -> None:
    assert words(one) == words(other) != []


@pytest.mark.parametrize(
    ("one", "other"),
    [("ışık", "IŞIK"), ("m²", "m³"), ("कि", "की"), ("é", "e"), ("נָכוֹן", "נכון"), ("é", "è"), ("й", "и")],
)
def test_what_differs_stays_apart(one: str, other: str) -> None:
    """The dotless i among them: without the language, I is an i as in English."""
    assert words(one) != words(other)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_has_rouge_scores_own_tokens(text: str) -> None:
    assert words(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@given(st.lists(st.sampled_from(["Caresses", "ponies", "MP3s", "10mg", "relational", "can't", "x-ray,"])))
def test_english_is_stemmed_as_before(picked: list[str]) -> None:
    assert words(" ".join(picked)) == DefaultTokenizer(use_stemmer=True).tokenize(" ".join(picked))


@given(st.text())
def test_canonically_equal_texts_have_equal_words(text: str) -> None:
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)) == words(text)


SCRIPTS = {
    "Chinese": "患者需要每天服药两次",
    "Japanese": "患者は毎日二回薬を飲む",
    "Korean": "환자는 하루에 두 번 약을 먹는다",
    "Arabic": "يجب على المريض تناول الدواء مرتين",
    "Persian": "بیمار باید دارو را می\u200cخورد",
    "Hebrew": "המטופל צריך לקחת תרופה",
    "Russian": "Пациент принимает лекарство дважды",
    "Greek": "Ο ασθενής παίρνει το φάρμακο",
    "Hindi": "रोगी को दिन में दो बार दवा लेनी चाहिए",
    "Tamil": "நோயாளி தினமும் மருந்து எடுக்க வேண்டும்",
    "Bengali": "রোগীকে প্রতিদিন ওষুধ খেতে হবে",
    "Thai": "ผู้ป่วยต้องกินยาวันละสองครั้ง",
    "Lao": "ຄົນເຈັບຕ້ອງກິນຢາ",
    "Burmese": "လူနာသည် ဆေးသောက်ရမည်",
    "Georgian": "პაციენტი იღებს წამალს",
    "Armenian": "Հիվանդը դեղ է ընդունում",
    "Amharic": "ታካሚው መድሃኒት ይወስዳል",
    "Vietnamese": "Bệnh nhân uống thuốc hai lần",
}


@pytest.mark.parametrize("language", SCRIPTS)
def test_a_right_answer_scores_in_every_script(language: str) -> None:
    text = SCRIPTS[language]
    half = text[: len(text) // 2]
    assert rouge_l([text, unicodedata.normalize("NFD", text).upper()], [text] * 2) == [100, 100]
    assert rouge_l(["unrelated words", ""], [text] * 2) == [0, 0]
    assert 20 < rouge_l([half], [text])[0] < 90


def test_one_wrong_letter_is_one_wrong_word() -> None:
    assert rouge_l(["Müller hat Fieber"], ["Möller hat Fieber"]) == [pytest.approx(200 / 3)]
    assert rouge_l(["患者服药三次"], ["患者服药两次"]) == [pytest.approx(500 / 6)]


@pytest.mark.parametrize(
    ("prediction", "reference", "points"),
    [
        ("!!!", "!!!", 100),
        ("+", "-", 0),
        ("+", "+", 100),
        ("👍", " 👍\n", 100),
        ("yes", "👍", 0),
        ("", "!", 0),
        ("", "", 0),
    ],
)
def test_a_reference_without_words_is_right_when_it_is_repeated(
    prediction: str, reference: str, points: float
) -> None:
    assert rouge_l([prediction], [reference]) == [points]


def committed() -> list[tuple[str, str]]:
    """Answers and references of the committed studies' examples."""
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*/comparison.json"))]
    rows = [row for page in pages for client in page["examples"].values() for row in client]
    return [(answer, row["response"]) for row in rows for answer in row["answers"].values()]


def test_committed_english_predictions_score_the_same_to_the_digit() -> None:
    pairs = committed()
    assert len(pairs) > 900
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    before = [100.0 * scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    assert sum(points > 0 for points in before) > 500
    assert rouge_l(*zip(*pairs, strict=True)) == before


def test_the_name_changes_with_the_rules() -> None:
    """A changed rule needs a new name, and then this line."""
    assert TOKENIZER == "unicode-words-1"
