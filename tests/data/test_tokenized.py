"""Tokenizing to disk and reading back: nothing lost, nothing half-written, nothing mistaken."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longgen.data import (
    CorpusView,
    Document,
    TokenizedCorpus,
    TokenizeProgress,
    check_vocabulary,
    read_documents,
    split_heldout,
    tokenize_documents,
    tokenized,
)
from longgen.errors import UsageError

BOS, EOS = 0, 1
FILES = {"tokens.bin", "documents.npy", "corpus.json"}


def docs(*texts: str) -> list[Document]:
    return [Document(text, f"doc {i}") for i, text in enumerate(texts)]


def test_documents_come_back_whole(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["The river runs.\n", "def walk(path):\n    caf\u00e9 \u4f60", "x"]
    corpus = tokenize_documents(docs(*texts), tokenizer, tmp_path / "new" / "corpus")
    assert len(corpus) == 3
    for i, text in enumerate(texts):
        ids = corpus.document(i).tolist()
        assert ids[-1] == EOS
        assert BOS not in ids  # this tokenizer has one, but does not put it before text
        assert tokenizer.decode(ids[:-1]) == text
    assert corpus.num_tokens == sum(corpus.lengths) == len(corpus.tokens)
    assert {path.name for path in (tmp_path / "new" / "corpus").iterdir()} == FILES


def test_bos_and_eos_can_be_asked_for(
    tmp_path: Path, tokenizer: Any, build_tokenizer: Callable[..., Any]
) -> None:
    adds_bos = build_tokenizer(320, adds_bos=True)

    def ends(tokenizer: Any, **options: bool) -> tuple[bool, bool]:
        ids = tokenize_documents(docs("a b", "c"), tokenizer, tmp_path, **options).document(1)
        assert len(ids) == 1 + (ids[0] == BOS) + (ids[-1] == EOS)
        return bool(ids[0] == BOS), bool(ids[-1] == EOS)

    assert ends(tokenizer) == (False, True)
    assert ends(tokenizer, add_bos=True, add_eos=False) == (True, False)
    assert ends(adds_bos) == (True, True)
    assert ends(adds_bos, add_bos=False) == (False, True)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert ends(bare) == (False, False)
    for option in ("bos", "eos"):
        with pytest.raises(UsageError, match=f"has no {option} token"):
            tokenize_documents(docs("a"), bare, tmp_path, **{f"add_{option}": True})


def test_text_cannot_forge_a_special_token(tmp_path: Path, tokenizer: Any) -> None:
    text = "one</s>two"
    plain = tokenize_documents(docs(text), tokenizer, tmp_path).document(0)
    assert (plain[:-1] != EOS).all()
    assert tokenizer.decode(plain[:-1]) == text
    parsed = tokenize_documents(docs(text), tokenizer, tmp_path, split_special_tokens=False)
    assert (parsed.document(0) == EOS).sum() == 2


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Any) -> None:
    def words(number: int) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(number)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    for number, dtype in ((65_535, "uint16"), (65_536, "uint32"), (70_000, "uint32")):
        corpus = tokenize_documents(docs(f"w1 w{number - 1}"), words(number), tmp_path)
        assert corpus.tokens.dtype == dtype
        assert corpus.document(0).tolist() == [1, number - 1]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(4, 40))
def test_pieces_join_to_the_text(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "PIECE_CHARACTERS", limit)
        pieces = list(tokenized._pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(len(piece) <= limit for piece, _ in pieces)
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    # A cut inside a line is only made where no line ends in the second half of the piece.
    for piece, _ in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece[limit // 2 :]


def test_cutting_a_long_document_does_not_change_its_ids(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def walk(path):\n    for name in sorted(path):\n\n        yield name\n" * 40
    whole = tokenize_documents(docs(code, "x"), tokenizer, tmp_path / "whole")
    monkeypatch.setattr(tokenized, "PIECE_CHARACTERS", 150)
    monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", 400)  # documents span batches, too
    assert len(list(tokenized._pieces(code))) > 10
    cut = tokenize_documents(docs(code, "x"), tokenizer, tmp_path / "cut")
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.ends.tolist() == whole.ends.tolist()


def test_documents_are_read_as_they_are_tokenized(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", 100)
    given_out = 0
    steps: list[tuple[int, TokenizeProgress]] = []

    def stream() -> Iterator[Document]:
        nonlocal given_out
        for i in range(50):
            given_out += 1
            yield Document("0123456789", f"doc {i}")

    tokenize_documents(
        stream(), tokenizer, tmp_path, progress=lambda step: steps.append((given_out, step))
    )
    assert [(out, step.documents, step.characters) for out, step in steps] == [
        (10 * i, 10 * i, 100 * i) for i in range(1, 6)
    ]
    assert steps[-1][1].tokens == TokenizedCorpus.open(tmp_path).num_tokens


def test_tokenizers_without_a_fast_backend_give_the_same(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = docs("The river</s> runs.\n\n  x", "caf\u00e9")
    fast = tokenize_documents(texts, tokenizer, tmp_path / "fast")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = tokenize_documents(texts, tokenizer, tmp_path / "slow")
    assert slow.tokens.tolist() == fast.tokens.tolist()


def test_padding_and_truncation_left_on_do_not_reach_the_corpus(
    tmp_path: Path, build_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = build_tokenizer(320, adds_bos=False)
    text = "The river runs past the old mill"
    plain = tokenize_documents(docs("a", text), tokenizer, tmp_path / "p", add_bos=False)
    tokenizer.pad_token = "</s>"
    tokenizer(["a", text], truncation=True, max_length=4, padding="max_length")
    after = tokenize_documents(docs("a", text), tokenizer, tmp_path / "a", add_bos=False)
    assert after.tokens.tolist() == plain.tokens.tolist()
    after.check_tokenizer(tokenizer)


def test_documents_without_tokens_are_left_out(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "w": 2}, unk_token="w"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    corpus = tokenize_documents(docs(" ", "w w", "\n", "w"), words, tmp_path, add_bos=True)
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == [[0, 2, 2, 1], [0, 2, 1]]
    with pytest.raises(UsageError, match="nothing to tokenize"):
        tokenize_documents(docs(" "), words, tmp_path)


def test_an_error_leaves_the_old_corpus_and_no_new_folder(tmp_path: Path, tokenizer: Any) -> None:
    def broken() -> Iterator[Document]:
        yield Document("some text", "a")
        raise KeyboardInterrupt

    old = tokenize_documents(docs("old text"), tokenizer, tmp_path / "old").tokens.tolist()
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            tokenize_documents(broken(), tokenizer, folder)
    assert not (tmp_path / "new").exists()
    assert {path.name for path in (tmp_path / "old").iterdir()} == FILES
    assert TokenizedCorpus.open(tmp_path / "old").tokens.tolist() == old
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        tokenize_documents(docs("a"), tokenizer, tmp_path / "file")


def test_info_tells_of_the_input(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("")
    corpus = tokenize_documents(read_documents([tmp_path]), tokenizer, tmp_path / "c")
    info = corpus.info
    assert info["tokens"] == corpus.num_tokens
    assert info["characters"] == info["sources"]["characters"] == 5
    assert info["sources"]["skipped"] == {"empty": 1}
    hashes = [
        tokenize_documents(docs(*texts), tokenizer, tmp_path / "c").info["input_sha256"]
        for texts in (["alpha"], ["al", "pha"], ["alpha", "x"])
    ]
    assert hashes[0] == info["input_sha256"]
    assert len(set(hashes)) == 3


def test_damaged_corpora_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    def fresh() -> Path:
        tokenize_documents(docs("one text", "two"), tokenizer, tmp_path / "c")
        return tmp_path / "c"

    for name in FILES:
        (fresh() / name).unlink()
        with pytest.raises(UsageError, match=f"no tokenized corpus in .*{name} is missing"):
            TokenizedCorpus.open(tmp_path / "c")
    with pytest.raises(UsageError, match="no tokenized corpus"):
        TokenizedCorpus.open(tmp_path / "nowhere")
    for name in FILES:
        path = fresh() / name
        path.write_bytes(path.read_bytes()[:-2])
        if name == "corpus.json":
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UsageError, match="is damaged"):
            TokenizedCorpus.open(tmp_path / "c")
    info = fresh() / "corpus.json"
    info.write_text(info.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UsageError, match="has format 99, this version reads 1"):
        TokenizedCorpus.open(tmp_path / "c")


def test_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: Any, build_tokenizer: Callable[..., Any]
) -> None:
    corpus = tokenize_documents(docs("one text"), tokenizer, tmp_path / "c")
    corpus.check_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    corpus.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"with 'bpe-320' .*320 tokens.*not with 'bpe-300'"):
        corpus.check_tokenizer(build_tokenizer(300, adds_bos=False))
    # The same words, split another way.
    other = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    same_words = PreTrainedTokenizerFast(
        tokenizer_object=other, bos_token="<s>", eos_token="</s>", name_or_path="prefixed"
    )
    with pytest.raises(UsageError, match="not with 'prefixed'"):
        corpus.check_tokenizer(same_words)


def test_vocabulary_must_fit_the_embedding(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, 320)
    check_vocabulary(tokenizer, 384)  # padded embeddings are common
    with pytest.raises(UsageError, match=r"'bpe-320' has token ids up to 319, .* only 319 rows"):
        check_vocabulary(tokenizer, 319)


def test_pickling_reopens_the_file(tmp_path: Path, tokenizer: Any) -> None:
    corpus = tokenize_documents(docs("text " * 20_000, "b"), tokenizer, tmp_path)
    data = pickle.dumps(split_heldout(corpus, tokens=100)[0])
    assert len(data) < corpus.num_tokens
    again = pickle.loads(data)
    assert isinstance(again.tokens, np.memmap)
    assert again.tokens.dtype == corpus.tokens.dtype
    assert np.array_equal(again.tokens, corpus.tokens)


def view_of(lengths: list[int]) -> CorpusView:
    """Return documents of the given lengths in which every token is another number."""
    ends = np.cumsum(lengths)
    return CorpusView(np.arange(ends[-1], dtype=np.uint32), ends - lengths, ends)


def tokens_of(view: CorpusView) -> list[int]:
    return [int(token) for i in range(len(view)) for token in view.document(i)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(lambda x: sum(x) > 3),
    st.floats(0.0, 1.0),
    st.integers(0, 3),
)
def test_heldout_shares_no_token_with_training(lengths: list[int], share: float, seed: int) -> None:
    corpus = view_of(lengths)
    target = 1 + int(share * (sum(lengths) // 2 - 1))
    train, held = split_heldout(corpus, tokens=target, seed=seed)
    assert sorted(tokens_of(train) + tokens_of(held)) == list(range(sum(lengths)))
    assert train.num_tokens + held.num_tokens == sum(lengths)
    # Tails are at most half of each document, rounded down.
    assert 0 < held.num_tokens <= target
    assert held.num_tokens >= min(0.75 * target, sum(n // 2 for n in lengths))
    again = split_heldout(corpus, tokens=target, seed=seed)
    assert [tokens_of(view) for view in again] == [tokens_of(train), tokens_of(held)]


def test_heldout_takes_whole_documents_where_they_fit() -> None:
    corpus = view_of([10] * 100)
    train, held = split_heldout(corpus, fraction=0.1, seed=0)
    assert held.lengths.tolist() == [10] * 10
    assert train.lengths.tolist() == [10] * 90
    other = split_heldout(corpus, fraction=0.1, seed=1)[1]
    assert tokens_of(other) != tokens_of(held)


def test_heldout_takes_tails_of_the_longest_otherwise() -> None:
    train, held = split_heldout(view_of([300, 1000, 20, 900]), tokens=600)
    assert held.lengths.tolist() == [500, 100]
    assert held.document(0).tolist() == list(range(800, 1300))
    assert held.document(1).tolist() == list(range(2120, 2220))
    assert train.lengths.tolist() == [300, 500, 20, 800]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "either a fraction or a number"),
        ({"fraction": 0.1, "tokens": 5}, "either a fraction or a number"),
        ({"fraction": 0.6}, "Cannot hold out 60 of the corpus's 100 tokens"),
        ({"fraction": 0.0}, "Cannot hold out 0"),
        ({"tokens": 51}, "Cannot hold out 51"),
        ({"tokens": -1}, "Cannot hold out -1"),
    ],
)
def test_heldout_sizes_that_are_refused(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        split_heldout(view_of([50, 50]), **asked)
