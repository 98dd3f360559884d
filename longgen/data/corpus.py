"""Read tokens back from a tokenized corpus on disk, and split off documents for evaluation.

A tokenized corpus is a folder of three files:

- `tokens.bin`: the token ids of all documents, one after another (uint16 for vocabularies below
  65,536, else uint32), memory-mapped when read;
- `documents.npy`: int64, the end of each document in tokens;
- `corpus.json`: the tokenizer's name and fingerprint, counts, the report on the sources, a hash
  of the input. It is written last: a folder without it is no corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longgen.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TOKENS_FILE, ENDS_FILE, INFO_FILE = "tokens.bin", "documents.npy", "corpus.json"

# Tells apart tokenizers that share a vocabulary but split text differently.
_PROBE = "Hello  world, it's 12345.67\n\tdef f(x):\n\n        return 'caf\u00e9' \u4f60\u597d"


class CorpusView:
    """See some documents, each a range of one token stream.

    Attributes:
        tokens: the whole stream, uint16 or uint32, usually memory-mapped.
        starts, ends: int64 [documents], the range of each document; ranges never overlap.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        assert len(starts) == len(ends)
        self.tokens = tokens
        self.starts = np.asarray(starts, dtype=np.int64)
        self.ends = np.asarray(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return self.ends - self.starts

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of one document, [tokens], as a view into the stream."""
        return self.tokens[self.starts[index] : self.ends[index]]

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the whole file to every data-loading process.
        state = dict(self.__dict__)
        if isinstance(self.tokens, np.memmap):
            state["tokens"] = (os.fspath(self.tokens.filename or ""), self.tokens.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            path, dtype = self.tokens
            self.tokens = np.memmap(path, dtype=dtype, mode="r")


class TokenizedCorpus(CorpusView):
    """See all documents of a tokenized corpus on disk; `info` is its `corpus.json`."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, info: dict[str, Any]) -> None:
        super().__init__(tokens, np.concatenate([[0], ends[:-1]]), ends)
        self.info = info

    @classmethod
    def open(cls, folder: str | Path) -> TokenizedCorpus:
        """Open the corpus in a folder.

        Raises:
            UsageError: the folder holds no corpus, or a damaged one.
        """
        folder = Path(folder)
        again = "Tokenize the data again"
        try:
            info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
            if info["format"] != FORMAT:
                raise UsageError(
                    f"The corpus in {folder} has format {info['format']}, this version reads "
                    f"{FORMAT}. {again}."
                )
            tokens = np.memmap(folder / TOKENS_FILE, dtype=np.dtype(info["dtype"]), mode="r")
            ends = np.load(folder / ENDS_FILE)
            whole = len(tokens) == info["tokens"] == ends[-1] and len(ends) == info["documents"]
        except FileNotFoundError as error:
            raise UsageError(
                f"There is no tokenized corpus in {folder}: {Path(error.filename).name} is "
                f"missing. {again}, or name another folder."
            ) from error
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"The tokenized corpus in {folder} is damaged ({error}). {again}."
            ) from error
        if not whole:
            raise UsageError(
                f"The tokenized corpus in {folder} is damaged: {INFO_FILE} tells of "
                f"{info['tokens']:,} tokens in {info['documents']:,} documents, the other files "
                f"hold {len(tokens):,} in {len(ends):,}. {again}."
            )
        return cls(tokens, ends, info)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer other than the one that made this corpus.

        Raises:
            UsageError: the fingerprints differ.
        """
        check_made_by(self.info["tokenizer"], tokenizer, "The corpus")


def check_made_by(made: dict[str, Any], tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a tokenizer other than the one that tokens were made with.

    Args:
        made: name, fingerprint and vocab_size of that one.
        tokenizer: the other.
        what: what the sentence calls the tokens.

    Raises:
        UsageError: the fingerprints differ.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != made["fingerprint"]:
        raise UsageError(
            f"{what} was tokenized with {made['name']!r} ({made['vocab_size']:,} tokens, "
            f"fingerprint {made['fingerprint'][:12]}), not with {tokenizer_name(tokenizer)!r} "
            f"({vocabulary_size(tokenizer):,} tokens, fingerprint {fingerprint[:12]}). "
            "Tokenize the data again with the model's own tokenizer."
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest token id, which `len(tokenizer)` misses if ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what decides token ids: vocabulary, document tokens, a tokenized sample.

    It doesn't depend on names, paths or the version of a library.
    """
    digest = hashlib.sha256()
    vocab = sorted((idx, token) for token, idx in tokenizer.get_vocab().items())
    digest.update(json.dumps(vocab).encode())
    sample = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    digest.update(json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, sample]).encode())
    return digest.hexdigest()


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for.

    Args:
        tokenizer: the tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        UsageError: the tokenizer's ids go beyond the embedding.
    """
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise UsageError(
            f"The tokenizer {tokenizer_name(tokenizer)!r} has token ids up to {size - 1:,}, but "
            f"the model's embedding has only {vocab_size:,} rows. Use the tokenizer that belongs "
            "to the checkpoint, or resize the model's embedding first."
        )


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a name for messages: where the tokenizer was loaded from, or its class."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def default_heldout(num_tokens: int, context: int) -> int:
    """Return how many tokens to hold out if nobody says: a twentieth, but two to sixteen sequences'
    worth, and at most a quarter."""
    tokens = min(max(num_tokens // 20, 2 * context), 16 * context)
    return min(tokens, num_tokens // 4)


def split_heldout(
    corpus: CorpusView,
    *,
    fraction: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> tuple[CorpusView, CorpusView]:
    """Split a corpus into a training and a held-out view that share no token.

    Whole documents are drawn at random for as long as they fit into the size asked for. If they
    make up less than three quarters of it (few documents, or most of them too long), the tails of
    the longest documents are held out instead, at most half of each.

    Args:
        corpus: the corpus or view to split.
        fraction: the share of tokens to hold out, above 0 and up to 0.5; or
        tokens: how many tokens to hold out.
        seed: decides which documents; the same seed gives the same split.

    Returns:
        The views (training, held-out); documents keep their order.

    Raises:
        UsageError: not exactly one of `fraction` and `tokens`, or less than one token or more
            than half of the corpus asked for.
    """
    total = corpus.num_tokens
    if (fraction is None) == (tokens is None):
        raise UsageError("Give either a fraction or a number of tokens to hold out, not both.")
    target = round(fraction * total) if fraction is not None else int(tokens or 0)
    if not 1 <= target <= total // 2:
        raise UsageError(
            f"Cannot hold out {target:,} of the corpus's {total:,} tokens. Hold out at least one "
            "token and at most half of them, or give more data."
        )
    lengths = corpus.lengths
    held = np.zeros(len(corpus), dtype=bool)
    size = 0
    for i in np.random.default_rng(seed).permutation(len(corpus)):
        if size + lengths[i] <= target:
            held[i] = True
            size += int(lengths[i])
    if size * 4 >= target * 3:
        return _view(corpus, ~held), _view(corpus, held)

    tails = np.zeros(len(corpus), dtype=np.int64)
    left = target
    for i in np.argsort(-lengths, kind="stable"):
        tails[i] = min(left, lengths[i] // 2)
        left -= int(tails[i])
    cut = corpus.ends - tails
    held = tails > 0
    train = CorpusView(corpus.tokens, corpus.starts, cut)
    return train, CorpusView(corpus.tokens, cut[held], corpus.ends[held])


def _view(corpus: CorpusView, chosen: np.ndarray) -> CorpusView:
    return CorpusView(corpus.tokens, corpus.starts[chosen], corpus.ends[chosen])
