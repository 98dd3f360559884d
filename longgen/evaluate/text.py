"""Given text as tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from longgen.data.sources import read_documents

# Windows of the longest length that given text is read for; more would only take time.
MOST_WINDOWS = 16


def tokenize_text(
    paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, longest: int
) -> np.ndarray:
    """Read files, folders and globs, as training does, into token ids [tokens].

    Reading stops after enough tokens for `MOST_WINDOWS` windows of `longest` tokens.

    Raises:
        UsageError: as `read_documents`.
    """
    ids: list[int] = []
    for document in read_documents(paths):
        ids += plain_ids(document.text, tokenizer)
        if len(ids) > MOST_WINDOWS * longest:
            break
    return np.asarray(ids)


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
