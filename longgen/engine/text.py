"""Turn tokens into text as they come, and find where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Tokens that are kept before new ones. An unfinished character can be spread over three, and some
# text must come before it, since decoders treat the first token apart (they drop its space).
_CONTEXT_TOKENS = 4
_MAX_WINDOW_TOKENS = 2 * _CONTEXT_TOKENS
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
# What transformers' clean-up rewrites (" .", " n't", " 've", ...), and the characters with which an
# unfinished one of these can end.
_CLEANED = " . ? ! , ' n't 'm 's 've 're"
_CLEANED_BEGINNINGS = " 'nvr"


class IncrementalDetokenizer:
    """Decode one request's tokens as they come.

    All text together is what `tokenizer.decode(ids, skip_special_tokens=True)` returns for all ids,
    whatever they are. Text is given out once later tokens can no longer change it, which is at
    once, except for:

    - an unfinished character, until it is finished;
    - byte tokens of SentencePiece vocabularies (<0x0A>), until another kind of token follows: an
      invalid byte undoes the whole run;
    - spaces that the tokenizer's clean-up may remove, if it has clean-up on.

    A token costs the decoding of a few tokens, however long the text is.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Begin a text.

        Args:
            tokenizer: of transformers.
        """
        self._tokenizer = tokenizer
        self._cleaner = _CleanUp(tokenizer) if _cleans_up(tokenizer) else None
        # The text of the window's first `_num_given` characters has been given out.
        self._window: list[int] = []
        self._num_given = 0
        self._kinds: dict[int, str] = {}
        self._pieces: list[str] = []
        self._is_flushed = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return "".join(self._pieces)

    def add(self, token_id: int) -> str:
        """Take the next token, and return the text that is final now and was not before."""
        assert not self._is_flushed, "a flushed text takes no more tokens"
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._kinds[token_id] = self._kind(token_id)
        if kind == "skipped":
            return ""
        self._window.append(token_id)
        if kind == "byte":
            return ""
        text = self._decode(self._window)
        # Only the last replacement character can be the beginning of something else.
        end = len(text) - text.endswith(_REPLACEMENT)
        new = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        if len(self._window) > _MAX_WINDOW_TOKENS:
            self._shorten(text[self._num_given :])
        return self._give(new if self._cleaner is None else self._cleaner.push(new))

    def flush(self) -> str:
        """End the text, and return what was still held back."""
        if self._is_flushed:
            return ""
        self._is_flushed = True
        new = self._decode(self._window)[self._num_given :]
        return self._give(new if self._cleaner is None else self._cleaner.push(new, last=True))

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _kind(self, token_id: int) -> str:
        """Return whether a token is "skipped" in decoding, a "byte" or an "ordinary" one."""
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return "skipped"
        if _BYTE_TOKEN.fullmatch(name):
            return "byte"
        # Special tokens are only empty where they are left out; a lone space may be empty anyway.
        is_empty = not self._decode([token_id])
        return "skipped" if is_empty and self._decode([token_id], False) else "ordinary"

    def _shorten(self, held: str) -> None:
        """Drop the window's oldest tokens; the text `held` at its end is not given out yet."""
        window = self._window[-_CONTEXT_TOKENS:]
        text = self._decode(window)
        num_given = len(text) - len(held)
        # Some text must come before new tokens, or they would be decoded as the first ones; and
        # what is held must not have got its shape from the tokens to be dropped.
        if num_given > 0 and text.endswith(held):
            self._window, self._num_given = window, num_given

    def _decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def _cleans_up(tokenizer: Any) -> bool:
    """Find out whether the tokenizer removes spaces before punctuation by default.

    Its setting alone does not say: transformers ignores it for some tokenizers.
    """
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer.encode(_CLEANED, add_special_tokens=False)
    return tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class _CleanUp:
    """Apply a tokenizer's clean-up to text that comes in pieces.

    All that it replaces begins with a space and only loses spaces. Text that doesn't end in
    a beginning of such a thing can therefore be cleaned apart from what follows.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._held: list[str] = []

    def push(self, piece: str, last: bool = False) -> str:
        """Take a piece and return cleaned text; with `last`, all that is left."""
        end = len(piece) if last else len(piece.rstrip(_CLEANED_BEGINNINGS))
        if not end and not last:
            self._held.append(piece)
            return ""
        text = "".join([*self._held, piece[:end]])
        self._held = [piece[end:]]
        return self._tokenizer.clean_up_tokenization(text)


class StopStrings:
    """Let text through up to the first stop string.

    The first is the one that starts first in the text, the longest of several at one place. The
    text let through does not depend on how it was cut into pieces: where a stop string is whole
    while one that starts before it may still become so, the decision waits.

    Attributes:
        matched: the stop string that ended the text; None before and without one.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Begin a text.

        Args:
            stop: strings of at least one character; none lets everything through.
        """
        assert all(stop), stop
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            the text that is final now, and whether a stop string ended it. Then nothing may follow.
        """
        assert self.matched is None, "a stopped text takes no more pieces"
        text = self._held + piece
        found = self._first(text)
        start = min((_unfinished(text, stop) for stop in self._stop), default=len(text))
        if found is not None and text.index(found) <= start:
            return self._end(text, found), True
        self._held = text[start:]
        return text[:start], False

    def flush(self) -> str:
        """End the text, and return what was held back, up to a stop string: see `matched`."""
        text = self._held
        found = self._first(text)
        if found is not None:
            return self._end(text, found)
        self._held = ""
        return text

    def _first(self, text: str) -> str | None:
        """Return the first stop string in the text."""
        found = [stop for stop in self._stop if stop in text]
        return min(found, key=lambda stop: (text.index(stop), -len(stop)), default=None)

    def _end(self, text: str, found: str) -> str:
        self.matched, self._held = found, ""
        return text[: text.index(found)]


def _unfinished(text: str, stop: str) -> int:
    """Return where the text's end may be the beginning of a stop string: the first such place, or
    the text's length."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return start
        start += 1
    return len(text)
