"""Given text as tokens, and where its documents begin."""

import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from longgen.evaluate.text import MOST_WINDOWS, Text, plain_ids, tokenize_text


def test_each_document_begins_where_its_tokens_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Files and the rows of a file alike."""
    documents = ["river " * 7, "mill", "rain on the mill " * 3]
    (tmp_path / "a.txt").write_text(documents[0])
    lines = [json.dumps({"text": text}) for text in documents[1:]]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    text = tokenize_text([tmp_path], tokenizer, 10_000)
    assert text.starts is not None and text.starts[0] == 0
    parts = np.split(text.ids, text.starts[1:])
    assert [part.tolist() for part in parts] == [plain_ids(one, tokenizer) for one in documents]
    assert len(text) == len(text.ids)


def test_the_last_document_is_whole_where_reading_stops(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 1000)
    size = len(plain_ids("a " * 1000, tokenizer))
    text = tokenize_text([tmp_path], tokenizer, size // MOST_WINDOWS + 1)
    assert text.starts is not None and text.starts.tolist() == [0, size]
    assert tokenizer.decode(text.ids[size:]) == "b " * 1000


def test_documents_begin_earlier_by_what_is_left_out_before_them() -> None:
    ids = np.array([7, 1, 8, 1, 1, 9, 9, 1])
    found = Text(ids, np.array([0, 1, 3, 5, 7])).without([1])
    assert found.ids.tolist() == [7, 8, 9, 9]
    # The third and the last document are empty now.
    assert found.starts is not None and found.starts.tolist() == [0, 1, 2, 2, 4]
    assert Text(ids).without([1]).starts is None
