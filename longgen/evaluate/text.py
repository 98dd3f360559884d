"""Given text as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from longgen.data.sources import read_documents

# Windows of the longest length that given text is read for; more would only take time.
MOST_WINDOWS = 16


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """Hold documents as one run of tokens, whose length is its own.

    Attributes:
        ids: token ids of all documents, one after another, shape (tokens,).
        starts: where each document begins, in tokens, shape (documents,), from 0 on and never
            falling; None where that isn't known.
    """

    ids: np.ndarray
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, ids: Sequence[int]) -> Text:
        """Leave some token ids out; documents begin so much earlier, and may be empty."""
        keep = ~np.isin(self.ids, ids)
        if self.starts is None:
            return Text(self.ids[keep])
        kept_before = np.append(0, keep.cumsum())
        return Text(self.ids[keep], kept_before[self.starts])


def tokenize_text(
    paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, longest: int
) -> Text:
    """Read files, folders and globs, as training does, into tokens.

    Reading stops after the document with which there are enough tokens for `MOST_WINDOWS` windows
    of `longest` tokens. That document is there whole.

    Raises:
        UsageError: as `read_documents`.
    """
    ids: list[int] = []
    starts: list[int] = []
    for document in read_documents(paths):
        starts.append(len(ids))
        ids += plain_ids(document.text, tokenizer)
        if len(ids) > MOST_WINDOWS * longest:
            break
    return Text(np.asarray(ids), np.asarray(starts))


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text as it stands: no special tokens are added, none is taken from its spelling."""
    ids: list[int] = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # no warning that the text is longer than the model's context
    )["input_ids"]
    return ids
