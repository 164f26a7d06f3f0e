"""Tokens to text: characters stay whole, stop strings never show, limits and chances hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from flexperts.serving.contract import Piece, Sampling
from flexperts.serving.engine.decoding import Decoding, draw_together, nucleus
from flexperts.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def pieces(text: str | bytes, *, end: bool = True, limit: int = 100, stop: tuple[str, ...] = ()) -> list[Piece]:
    """Feed a text byte by byte, until the answer ends."""
    answer = Decoding(TOKENIZER, {END}, Sampling(limit, stop=stop))
    raw = text.encode() if isinstance(text, str) else text
    letters = TOKENIZER.convert_tokens_to_ids(_letters(raw))
    found: list[Piece] = []
    for token in [*letters, *([END] if end else [])]:
        if piece := answer.take(token):
            found.append(piece)
            if piece.finish:
                break
    return found


def _letters(raw: bytes) -> list[str]:
    """Return the byte tokenizer's names of bytes."""
    table = dict(enumerate("".join(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)])))
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: table[i] for i, byte in enumerate(plain)}
    names |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in set(plain))}
    return [names[byte] for byte in raw]


def test_characters_are_never_split() -> None:
    found = pieces("añ€😀!")
    assert [piece.text for piece in found] == ["a", "ñ", "€", "😀", "!", ""]
    assert [piece.tokens for piece in found] == [1, 2, 3, 4, 1, 1]
    assert found[-1].finish == "stop"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert pieces(b"a\xe2\x82", limit=3, end=False) == [Piece("a", 1), Piece("\ufffd", 2, "length")]
    assert "".join(piece.text for piece in pieces(b"\x80\x80\x80a\xf0\x9f")) == "\ufffd\ufffd\ufffda\ufffd"


def test_decoders_that_show_every_missing_byte_split_no_character() -> None:
    """Byte-fallback vocabularies, as Mixtral's, decode an unfinished run to one U+FFFD for each byte."""
    letters = ["a", *(f"<0x{byte:02X}>" for byte in "😀".encode())]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, "</s>"])}, merges=[]))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    answer = Decoding(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), {5}, Sampling(9))
    found = [answer.take(token) for token in range(6)]
    assert [piece and piece.text for piece in found] == ["a", None, None, None, "😀", ""]


def test_a_stop_string_ends_the_answer_before_it() -> None:
    found = pieces("one. Two", stop=("Tw", ". T"))
    assert "".join(piece.text for piece in found) == "one"
    assert found[-1].finish == "stop"
    assert sum(piece.tokens for piece in found) == len("one. T")


def test_what_only_starts_like_a_stop_string_is_shown_in_the_end() -> None:
    assert "".join(piece.text for piece in pieces("a##b#", stop=("###",))) == "a##b#"
    assert [piece.text for piece in pieces("a##b", stop=("###",))] == ["a", "##b", ""]


def test_the_limit_counts_tokens_and_the_end_is_no_text() -> None:
    assert pieces("abc", limit=2) == [Piece("a", 1), Piece("b", 1, "length")]
    assert pieces("") == [Piece("", 1, "stop")]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [1]), (0.6, [1, 3]), (0.85, [0, 1, 3]), (1.0, [0, 1, 2, 3])])
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    chances = torch.tensor([0.15, 0.55, 0.05, 0.25])
    assert nucleus(chances, top_p).nonzero().flatten().tolist() == kept


def test_draws_follow_the_chances_and_the_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])

    def drawn(seed: int, temperature: float) -> list[int]:
        answer = Decoding(TOKENIZER, (), Sampling(1, temperature=temperature, seed=seed))
        return [answer.draw(logits) for _ in range(3000)]

    counts = torch.bincount(torch.tensor(drawn(0, 2.0)), minlength=4) / 3000
    assert torch.allclose(counts, (logits / 2).softmax(-1), atol=0.03)
    assert drawn(0, 1.0) == drawn(0, 1.0) != drawn(1, 1.0)


# Every tokenizer: the pieces together are the whole text.


def byte_fallback() -> PreTrainedTokenizerFast:
    """A vocabulary of some words, with bytes for all else and a space before words, as sentencepiece makes them."""
    words = ["▁", "▁the", "▁Müller", "a", "b", "中", "\ufffd", *(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(words)}, merges=[]))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["▁a", "b", "▁", "中▁", "é", "</s>"])}, merges=[]))
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.WordPiece({t: i for i, t in enumerate(["a", "##b", "Mü", "##ller", "</s>"])}, unk_token="a")
    )
    raw.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


KINDS = {kind.__name__: kind() for kind in (byte_fallback, metaspace, word_pieces, byte_tokenizer)}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_pieces_are_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    end = tokenizer.eos_token_id
    tokens = data.draw(
        st.lists(st.integers(0, min(len(tokenizer), 262) - 2).filter(lambda t: t != end), max_size=40)
    )
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = data.draw(st.sampled_from([(), ("b",), (" a", "中a"), ("\ufffd",), ("the M", "ller", "zz")]))
    answer = Decoding(tokenizer, {end}, Sampling(1000, stop=stop))
    found = []
    for token in [*tokens, end]:
        if piece := answer.take(token):
            found.append(piece)
            if piece.finish:
                break
    joined = "".join(piece.text for piece in found)
    cut = min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))
    # One bad byte makes the byte-fallback decoder take back the good ones before it, which have been said.
    if kind != "byte_fallback" or "\ufffd" not in text:
        assert joined == text[:cut]
    assert not any(s in joined for s in stop)
    assert sum(piece.tokens for piece in found) == len(answer.tokens)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("byte_fallback", "中国"),
        ("byte_tokenizer", "中国"),
        ("byte_fallback", "हिन्दी the"),
        ("byte_tokenizer", "👩‍👩‍👧 é"),
    ],
)
def test_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    names = [f"<0x{byte:02X}>" for byte in text.encode()] if kind == "byte_fallback" else _letters(text.encode())
    answer = Decoding(tokenizer, {tokenizer.eos_token_id}, Sampling(1000))
    taken = [answer.take(token) for token in [*tokenizer.convert_tokens_to_ids(names), tokenizer.eos_token_id]]
    pieces_of = [piece.text for piece in taken if piece]
    assert "".join(pieces_of) == text
    assert not any("\ufffd" in piece for piece in pieces_of)
    assert len(pieces_of) > 2


def test_rows_that_are_drawn_together_have_their_own_chances() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -30.0])
    settings = [Sampling(1, 0.7, 0.8), Sampling(1, 1.5, 1.0)]
    draws = 20_000
    answers = [Decoding(TOKENIZER, {END}, replace(s, seed=n)) for s in settings for n in range(draws)]
    tokens = draw_together(answers, logits.expand(len(answers), -1)).view(2, draws)
    for its, chosen in zip(settings, tokens, strict=True):
        chances = nucleus((logits / its.temperature).softmax(-1), its.top_p)
        expected = chances / chances.sum()
        found = torch.bincount(chosen, minlength=5) / draws
        assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
        assert not found[expected == 0].any()


def test_chances_that_are_not_finite_give_no_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    answers = [Decoding(TOKENIZER, {END}, Sampling(1, 1.0, 0.9, seed=n)) for n in range(2)]
    tokens = draw_together(answers, logits).tolist()
    assert tokens[0] in (0, 1)
    assert tokens[1] == -1
