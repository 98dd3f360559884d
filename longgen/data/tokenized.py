"""Tokenize documents into a corpus on disk."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longgen.data.corpus import (
    ENDS_FILE,
    FORMAT,
    INFO_FILE,
    TOKENS_FILE,
    TokenizedCorpus,
    tokenizer_fingerprint,
    tokenizer_name,
    vocabulary_size,
)
from longgen.data.readers import Document
from longgen.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARACTERS = 100_000
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class TokenizeProgress:
    """Say how far tokenization is: whole documents, characters and tokens written so far."""

    documents: int
    characters: int
    tokens: int


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    split_special_tokens: bool = True,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenizedCorpus:
    """Tokenize documents into a corpus on disk, holding about a million characters at a time.

    Files appear under their names only when they are whole, `corpus.json` last. A corpus that is
    already in the folder is replaced; on an error or an interrupt it stays as it was.

    Args:
        documents: what to tokenize; the report of `read_documents` is kept in `corpus.json`.
        tokenizer: a Hugging Face tokenizer.
        out_dir: the folder to write; made if missing.
        add_bos: begin each document with the beginning-of-sequence token. By default only if the
            tokenizer itself puts it in front of text, as the model then expects it in use too.
        add_eos: end each document with the end-of-sequence token. By default if there is one.
        split_special_tokens: take text that spells a special token ("</s>") for plain text, so
            that documents can't forge an end; False reads it as that token (for chat templates).
        progress: called after every batch.

    Raises:
        UsageError: no documents, a bos or eos asked of a tokenizer that has none, or `out_dir` is
            a file.
    """
    encoder = Encoder.of(
        tokenizer, add_bos=add_bos, add_eos=add_eos, split_special_tokens=split_special_tokens
    )
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder for the tokenized corpus.")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    ends = array("q")
    tokens = characters = 0
    with ExitStack() as undo:
        if created:
            undo.callback(folder.rmdir)
        temporary = {name: folder / f"{name}.tmp" for name in (TOKENS_FILE, ENDS_FILE, INFO_FILE)}
        for path in temporary.values():
            undo.callback(path.unlink, missing_ok=True)

        with temporary[TOKENS_FILE].open("wb") as file:
            for batch in encoder.encode(documents, digest):
                ends.extend(tokens + end for end in batch.ends)
                tokens += len(batch.tokens)
                characters += batch.characters
                file.write(batch.tokens.tobytes())
                if progress is not None:
                    progress(TokenizeProgress(len(ends), characters, tokens))
            _sync(file)
        if not ends:
            raise UsageError("There is nothing to tokenize: no document holds any text.")
        with temporary[ENDS_FILE].open("wb") as file:
            np.save(file, np.frombuffer(ends, dtype=np.int64))
            _sync(file)
        report = getattr(documents, "report", None)
        info = {
            "format": FORMAT,
            "tokenizer": identity(tokenizer),
            **encoder.facts(),
            "documents": len(ends),
            "tokens": tokens,
            "characters": characters,
            "input_sha256": digest.hexdigest(),
            "sources": None if report is None else report.to_dict(),
        }
        with temporary[INFO_FILE].open("w", encoding="utf-8") as text:
            text.write(json.dumps(info, indent=2) + "\n")
            _sync(text)
        undo.pop_all()
        # Without its corpus.json the old corpus is gone before the new one starts to appear.
        (folder / INFO_FILE).unlink(missing_ok=True)
        for name, path in temporary.items():
            path.replace(folder / name)
    return TokenizedCorpus.open(folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is recorded of a tokenizer, and checked later."""
    return {
        "name": tokenizer_name(tokenizer),
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
    }


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold a batch of encoded text, which documents may reach into and out of.

    Attributes:
        tokens: ids, [tokens].
        ends: end of each document that ends here, counted from the start of the batch.
        characters: that were encoded.
    """

    tokens: np.ndarray
    ends: list[int]
    characters: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """Turn documents into ids with their marks; goes to another process as a few megabytes.

    Attributes:
        backend: a `tokenizers.Tokenizer`, or the whole tokenizer if that is not a fast one.
        bos, eos: ids before and after each document, [] or one each.
        split_special_tokens: take text that spells a special token for plain text.
        dtype: of the ids.
    """

    backend: Any
    bos: list[int]
    eos: list[int]
    split_special_tokens: bool
    dtype: np.dtype

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        split_special_tokens: bool = True,
    ) -> Encoder:
        """Make the encoder of a tokenizer; see `tokenize_documents` for the options.

        Raises:
            UsageError: a bos or eos is asked of a tokenizer that has none.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for asked, idx, name in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
            if asked and idx is None:
                raise UsageError(
                    f"The tokenizer {tokenizer_name(tokenizer)!r} has no {name} token to mark "
                    f"documents with. Set its {name}_token, or leave add_{name} out."
                )
        if add_bos is None:
            add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        if add_eos is None:
            add_eos = eos is not None
        if tokenizer.is_fast:
            # The tokenizer itself stays as it is.
            backend = type(tokenizer.backend_tokenizer).from_str(
                tokenizer.backend_tokenizer.to_str()
            )
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = split_special_tokens
        return cls(
            backend if tokenizer.is_fast else tokenizer,
            [bos] if add_bos else [],
            [eos] if add_eos else [],
            split_special_tokens,
            np.dtype(np.uint16 if vocabulary_size(tokenizer) < 65536 else np.uint32),
        )

    def facts(self) -> dict[str, Any]:
        """Return what readers of the ids have to know."""
        return {
            "bos_token_id": self.bos[0] if self.bos else None,
            "eos_token_id": self.eos[0] if self.eos else None,
            "dtype": self.dtype.name,
        }

    def encode(self, documents: Iterable[Document], digest: Any) -> Iterator[Encoded]:
        """Encode documents, about a million characters at a time; one without tokens is left out.

        Args:
            documents: what to encode.
            digest: a hash, updated with the texts.
        """
        head: list[int] = self.bos  # what goes before the next tokens of the current document
        held = 0  # tokens of the current document in earlier batches
        for batch in _batches(documents, digest):
            ids: list[int] = []
            ends: list[int] = []
            for piece_ids, (_, is_last) in zip(
                self._ids([piece for piece, _ in batch]), batch, strict=True
            ):
                if piece_ids:
                    ids += head
                    ids += piece_ids
                    head = []
                if is_last:
                    if held + len(ids) > (ends[-1] if ends else 0):
                        ids += self.eos
                        ends.append(len(ids))
                        head = self.bos
                    held = 0
            held = held + len(ids) if not ends else len(ids) - ends[-1]
            yield Encoded(
                np.asarray(ids, dtype=self.dtype), ends, sum(len(piece) for piece, _ in batch)
            )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if hasattr(self.backend, "encode_batch_fast"):
            # What the call below comes to; but it also asks for offsets, which doubles the time.
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in encoded]
        return self.backend(
            texts,
            add_special_tokens=False,
            split_special_tokens=self.split_special_tokens,
            return_attention_mask=False,
            verbose=False,  # no warning about the model's length
        )["input_ids"]


def _batches(documents: Iterable[Document], digest: Any) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of (piece of text, whether it ends its document), and hash the texts."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        for piece, is_last in _pieces(document.text):
            digest.update(piece.encode("utf-8"))
            if is_last:  # tells ["ab"] from ["a", "b"]
                digest.update(len(document.text).to_bytes(8, "little"))
            batch.append((piece, is_last))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    # Pieces are tokenized apart, so no token spans a cut. Byte-level tokenizers break text there
    # anyhow if the next line starts with a non-space, which is why such a place is preferred:
    # the ids are then those of the whole text. Elsewhere, and with tokenizers that put a space in
    # front of text (SentencePiece style), about one token in 100,000 characters differs.
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start, start + PIECE_CHARACTERS)
        yield text[start:end], False
        start = end
    yield text[start:], True


def _cut(text: str, start: int, limit: int) -> int:
    """Return where to cut text[start:limit + 1]: the last good line start, line start or limit."""
    # Only the second half is looked at, so that pieces stay long.
    half = (start + limit) // 2
    newline = last = text.rfind("\n", half, limit)
    while newline >= 0:
        if not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", half, newline)
    return last + 1 if last >= 0 else limit
