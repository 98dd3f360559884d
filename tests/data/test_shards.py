"""Token shards: one stream of many files, in datatrove's format, and no damage unnoticed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgen.data import tokenize_documents
from longgen.data.readers import Document
from longgen.data.shards import ShardedTokens, is_tokenized, open_tokens, write_shard
from longgen.errors import UsageError


def write(folder: Path, *shards: list[list[int]], dtype: str = "<u2") -> None:
    """Write shards, each a list of documents."""
    folder.mkdir(exist_ok=True)
    for number, documents in enumerate(shards):
        tokens = folder / "tokens"
        tokens.write_bytes(np.asarray([i for one in documents for i in one], dtype=dtype).tobytes())
        write_shard(folder, f"{number:03}", tokens, np.cumsum([len(one) for one in documents]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_ranges_and_places_are_those_of_one_array(sizes: list[int], data: Any) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    stream = ShardedTokens([Path(f"{i}") for i in range(len(sizes))], sizes, whole.dtype)
    # In place of the files.
    stream._maps = dict(enumerate(np.split(whole, np.cumsum(sizes)[:-1])))
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(0, len(whole)))
    assert stream[start:stop].tolist() == whole[start:stop].tolist()
    if len(whole):
        places = np.asarray(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20)))
        places = places.astype(np.int64)
        assert stream[places].tolist() == whole[places].tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents_of_several_files(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "c", [[1, 2], [3]], [], [[4, 5, 6]], dtype=dtype)
    corpus = open_tokens(tmp_path / "c")
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == [[1, 2], [3], [4, 5, 6]]
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert corpus.info["tokenizer"] is None
    again = pickle.loads(pickle.dumps(corpus))
    assert again.document(2).tolist() == [4, 5, 6]


def test_the_one_file_corpus_opens_too(tmp_path: Path, tokenizer: Any) -> None:
    corpus = tokenize_documents([Document("a b", "x")], tokenizer, tmp_path / "c")
    assert is_tokenized(tmp_path / "c")
    assert open_tokens(tmp_path / "c").document(0).tolist() == corpus.document(0).tolist()


def test_damage_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def fresh() -> None:
        write(folder, [[1, 2], [3]], [[4, 5, 6]])

    with pytest.raises(UsageError, match="no tokenized documents in"):
        open_tokens(tmp_path)
    assert not is_tokenized(tmp_path)
    fresh()
    (folder / "001.ds").write_bytes(b"\0\0")
    with pytest.raises(UsageError, match="8 bytes for 6 tokens, which is neither 2 nor 4"):
        open_tokens(folder)
    fresh()
    (folder / "001.ds").unlink()
    with pytest.raises(UsageError, match=r"001\.ds cannot be read"):
        open_tokens(folder)
    fresh()
    (folder / "000.ds.index").write_bytes(np.asarray([3, 2], dtype="<u8").tobytes())
    with pytest.raises(UsageError, match="its ends fall"):
        open_tokens(folder)
    fresh()
    # As many bytes in all, but in the wrong files.
    (folder / "000.ds").write_bytes(bytes(8))
    (folder / "001.ds").write_bytes(bytes(4))
    with pytest.raises(UsageError, match=r"000\.ds is damaged: it holds 4 tokens, its index"):
        open_tokens(folder)
    (folder / "corpus.json").write_text("{")
    with pytest.raises(UsageError, match=r"corpus\.json is damaged"):
        open_tokens(folder)
    (folder / "corpus.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(UsageError, match="has format 7"):
        open_tokens(folder)


def test_datatrove_writes_what_is_read_and_reads_what_is_written(
    tmp_path: Path, tokenizer: Any
) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document as TroveDocument
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.dataset import DatatroveFileDataset

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = ["The river runs.\n", "x", "past the old mill"]
    DocumentTokenizer(
        str(tmp_path / "trove"),
        str(tmp_path / "tokenizer" / "tokenizer.json"),
        eos_token="</s>",
        shuffle_documents=False,
    ).run((TroveDocument(text=text, id="") for text in texts), 0, 1)
    theirs = open_tokens(tmp_path / "trove")
    documents = [Document(text, "") for text in texts]
    ours = tokenize_documents(documents, tokenizer, tmp_path / "ours")
    assert theirs.num_tokens == ours.num_tokens
    for i in range(3):
        assert theirs.document(i).tolist() == ours.document(i).tolist()

    write(tmp_path / "written", [[1, 2, 3], [4, 5, 6, 7]])
    rows = DatatroveFileDataset(str(tmp_path / "written" / "000.ds"), seq_len=2, token_size=2)
    assert [rows[i]["input_ids"].tolist() for i in range(len(rows))] == [[1, 2, 3], [4, 5, 6]]
