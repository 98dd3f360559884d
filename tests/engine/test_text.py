"""Text from tokens: equal to the tokenizer's own decoding, linear, and stopped where it should."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

from longgen.engine.text import IncrementalDetokenizer, StopStrings

CORPUS = [
    "The miller's wife didn't say: \"You 've seen it , n't you ? We 're ' here ' now .\"",
    "Quick brown foxes jump over lazy dogs! In 1984, he said: it 's fine .",
    "你好\uff0c世界。水车在河边转动。水は流れ、車は回る。",
    "🙂🙃 families 👩‍👩‍👧‍👦 and flags 🇩🇪🇫🇷; naïve café, Straße, ẞ",
    "def f(x):\n    return  x + 1\n\n\tpass\n        # ok",
] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """Build one like GPT-2's, with a special token that transformers has no name for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=SPECIAL[:2], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["→ordinary←"])
    return wrap(tokenizer, **options)


def unigram(**options: Any) -> PreTrainedTokenizerFast:
    """Build one like T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=250, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, unk_token="<unk>", **options)


def characters(**options: Any) -> PreTrainedTokenizerFast:
    """Build one that cuts everything to pieces, also what clean-up puts together."""
    vocabulary = [(token, -1.0) for token in ("<unk>", *SPECIAL, *"▁.?!,'ntmsvreab")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return wrap(tokenizer, unk_token="<unk>", **options)


def byte_fallback(**options: Any) -> PreTrainedTokenizerFast:
    """Build one like Llama-2's: characters outside the vocabulary are written as bytes."""
    pieces = ["▁", "▁▁", "a", "b", "▁a", "▁the", "he", ".", "", "\ufffd", "水", "🙂"]
    tokens = ["<unk>", *SPECIAL, *BYTES, *pieces]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return wrap(tokenizer, unk_token="<unk>", **options)


def word_piece(**options: Any) -> PreTrainedTokenizerFast:
    """Build one like BERT's."""
    tokens = ["[UNK]", *SPECIAL, "a", "do", "##a", "##n't", "n", "'", "t", "s", "ve", *".,!?"]
    model = models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(SPECIAL)
    return wrap(tokenizer, unk_token="[UNK]", **options)


BUILDERS: list[Callable[..., PreTrainedTokenizerFast]] = [
    byte_level,
    unigram,
    characters,
    byte_fallback,
    word_piece,
]


@pytest.fixture(
    scope="module",
    params=[(build, clean) for build in BUILDERS for clean in (False, True)],
    ids=lambda param: param[0].__name__ + ("-clean" if param[1] else ""),
)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    build, clean = request.param
    return build(clean_up_tokenization_spaces=clean)


def stream(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    given_out = ""
    for token_id in ids:
        piece = detokenizer.add(token_id)
        given_out += piece
        assert detokenizer.text == given_out
        yield piece
    piece = detokenizer.flush()
    assert detokenizer.text == given_out + piece and detokenizer.flush() == ""
    yield piece


# Detokenizing


@given(data=st.data())
def test_pieces_of_any_tokens_are_what_the_tokenizer_decodes(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    # Few kinds of token, often repeated, find more than many: hypothesis draws the kinds first.
    # Ids past the tokenizer's end come from models whose vocabulary is padded.
    kinds = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), min_size=1, max_size=12))
    ids = data.draw(st.lists(st.sampled_from(kinds), max_size=80))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids)) == expected


@given(text=st.text(st.sampled_from("ab .,'nrvste!?\n水🙂é\ufffd")) | st.text())
@example(text="  two  ' s and do n't  . ' ' 's   ")
@example(text="".join(CORPUS[:5]))
def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    given_out = ""
    for piece in stream(tokenizer, ids):
        given_out += piece
        assert expected.startswith(given_out)
    assert given_out == expected


def test_long_random_outputs(tokenizer: PreTrainedTokenizerFast) -> None:
    choices = random.Random(7)
    ids = choices.choices(range(len(tokenizer)), k=3000)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_comes_as_soon_as_it_is_sure() -> None:
    tokenizer = byte_level()
    ids = [token for char in "a🙂b" for token in tokenizer.encode(char)]
    smile = tokenizer.encode("🙂")
    pieces = list(stream(tokenizer, ids))
    assert pieces == ["a", *[""] * (len(smile) - 1), "🙂", "b", ""]
    # An unfinished character at the end is what the tokenizer makes of it.
    assert len(smile) > 1 and list(stream(tokenizer, smile[:-1]))[-1] == "\ufffd"
    # Only the last of several replacement characters may still become another.
    broken = tokenizer.convert_tokens_to_ids([chr(0x122), chr(0x122), "a"])  # bytes 0x80
    assert list(stream(tokenizer, broken)) == ["", "\ufffd", "\ufffda", ""]


def test_a_run_of_bytes_waits_for_its_end() -> None:
    tokenizer = byte_fallback()
    whole = tokenizer.convert_tokens_to_ids(["▁a", "<0xE4>", "<0xBD>", "<0xA0>", "</s>"])
    after = tokenizer.convert_tokens_to_ids(["<0xE4>", "b"])
    assert list(stream(tokenizer, [*whole, after[1]])) == ["a", "", "", "", "", "你b", ""]
    # The byte after it makes four invalid ones of the run: text given out earlier would be wrong.
    assert list(stream(tokenizer, [*whole, *after]))[-2] == "\ufffd" * 4 + "b"


def test_text_before_empty_tokens_is_remembered() -> None:
    """A window of empty tokens would decode the next one as if it came first, without its space."""
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["▁the", *[""] * 30, "▁a"])
    assert "".join(stream(tokenizer, ids)) == "the a"
    # The last byte is only invalid because of the first.
    ids = tokenizer.convert_tokens_to_ids([*["▁a"] * 5, "<0xE4>", *["<0x41>"] * 3, "", "b"])
    assert "".join(stream(tokenizer, ids)) == "a a a a a" + "\ufffd" * 4 + "b"


class Counting:
    """Count the tokens that a tokenizer decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize(
    ("build", "token"),
    [
        (byte_level, "a"),
        (byte_level, chr(0x122)),  # an invalid byte
        (byte_level, "</s>"),
        (byte_level, "<|end|>"),
        (byte_fallback, "<0x0A>"),
        (byte_fallback, "\ufffd"),
        (byte_fallback, "▁"),
        (unigram, "▁"),
        (unigram, "</s>"),
    ],
)
def test_the_cost_of_a_token_does_not_grow(build: Any, token: str) -> None:
    counting = Counting(build(clean_up_tokenization_spaces=True))
    ids = [counting.convert_tokens_to_ids(token)] * 4000
    text = "".join(stream(counting, ids))
    assert text == counting._tokenizer.decode(ids, skip_special_tokens=True)
    assert counting.decoded < 20 * len(ids)


# Stop strings


def stop_oracle(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Look at every place of the whole text, and there at every stop string, longest first."""
    for start in range(len(text)):
        for each in sorted(stop, key=len, reverse=True):
            if text[start : start + len(each)] == each:
                return text[:start], each
    return text, None


def cut(text: str, places: Sequence[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


def let_through(pieces: Sequence[str], stops: StopStrings) -> tuple[str, bool]:
    text = ""
    for piece in pieces:
        emitted, stopped = stops.push(piece)
        text += emitted
        if stopped:
            return text, True
    return text + stops.flush(), stops.matched is not None


LETTERS = st.text("ab", max_size=24)


@settings(max_examples=400)
@given(
    text=LETTERS | st.text("abc\n🙂", max_size=24),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    places=st.lists(st.integers(0, 24), max_size=12),
)
def test_stop_strings_are_found_as_in_the_whole_text(
    text: str, stop: list[str], places: list[int]
) -> None:
    expected, which = stop_oracle(text, stop)
    stops = StopStrings(stop)
    found, stopped = let_through(cut(text, places), stops)
    assert (found, stopped) == (expected, which is not None)
    whole = StopStrings(stop)
    assert let_through([text], whole) == (expected, which is not None)
    # Of several at one place, those that come later cannot be known when the first is whole.
    assert whole.matched == which
    assert (stops.matched is None) == (which is None)


def test_text_is_held_back_no_longer_than_it_must() -> None:
    stops = StopStrings(["</end>", "\n\n"])
    pushed = [stops.push(piece) for piece in ("a <", "b</", "en", "c\n", "d\n", "\ne")]
    assert pushed == [
        ("a ", False),
        ("<b", False),
        ("", False),
        ("</enc", False),
        ("\nd", False),
        ("", True),
    ]
    assert stops.matched == "\n\n" and stops.flush() == ""
    # A longer one at the same place would change nothing in the text.
    assert StopStrings(["ab", "abc"]).push("xab") == ("x", True)


def test_a_stop_string_waits_for_one_that_began_before_it() -> None:
    def begin() -> StopStrings:
        stops = StopStrings(["abcd", "c"])
        assert stops.push("xabc") == ("x", False)
        return stops

    assert begin().push("d") == ("", True)
    assert begin().push("e") == ("ab", True)
    ended = begin()
    assert (ended.flush(), ended.matched) == ("ab", "c")


def test_without_stop_strings_everything_passes() -> None:
    stops = StopStrings(())
    assert stops.push("anything") == ("anything", False)
    assert (stops.flush(), stops.matched) == ("", None)
