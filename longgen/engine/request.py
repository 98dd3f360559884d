"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from longgen.engine.sampling import SamplingParams, SamplingRow
from longgen.engine.text import IncrementalDetokenizer, StopStrings


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """Hold one request: what was asked, what was written, and what of it the cache holds.

    Attributes:
        id: its name.
        prompt: token ids.
        params: how tokens are chosen and when to stop.
        row: its random state, and the tokens that a repetition penalty looks at.
        output: token ids written so far.
        pieces: text written so far, as it came.
        num_cached: tokens of prompt and output whose keys and values are in the cache.
        slot: its slot in sparse layers, while it runs.
        block_table: its pages in full layers, while it runs.
        is_sound: whether a token was chosen after all that its slot holds: these are numbers.
        failed_alone: whether memory ran out when last it was in a step, alone and with few tokens.
        num_preempted: how often it lost its place and had to be read again.
        detokenizer: turns tokens into text as they come; None where no text is wanted.
        stop_strings: looks for the strings that end it.
        finish_reason: "stop", "length", "cancelled" or "error", once it has ended.
        error: what went wrong, in a sentence.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    row: SamplingRow
    detokenizer: IncrementalDetokenizer | None = None
    stop_strings: StopStrings | None = None
    output: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    num_cached: int = 0
    slot: int | None = None
    block_table: list[int] = field(default_factory=list)
    is_sound: bool = False
    failed_alone: bool = False
    num_preempted: int = 0
    state: State = State.WAITING
    finish_reason: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """Text written so far, up to a stop string."""
        return "".join(self.pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_left(self) -> int:
        """Tokens that still have to go through the model before the next can be chosen."""
        return self.num_tokens - self.num_cached

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return tokens [start, stop) of prompt and output."""
        length = len(self.prompt)
        return [
            *self.prompt[start:stop],
            *self.output[max(start - length, 0) : max(stop - length, 0)],
        ]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Tell what one step brought a request.

    Attributes:
        id: the request's name.
        text: new text; stop strings are left out.
        token_ids: new tokens.
        finish_reason: "stop" (the model or a stop string ended it), "length", "cancelled" or
            "error"; None while it goes on.
        error: what went wrong, in a sentence.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    error: str | None = None
