"""The engine: many requests through one hybrid model, a step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from longgen.engine.cache import EngineCache, Span
from longgen.engine.checks import check_kv_dtype, check_limits, check_model, check_text, token_ids
from longgen.engine.decode import DecodeBatch
from longgen.engine.request import Request, RequestOutput, State
from longgen.engine.runner import DecodeRunner
from longgen.engine.sampling import Sampler, SamplingParams, SamplingRow
from longgen.engine.scheduler import Scheduler
from longgen.engine.step import Step, run, set_scales
from longgen.engine.text import IncrementalDetokenizer, StopStrings
from longgen.errors import UsageError
from longgen.hf.compile import compile_layers
from longgen.memory import clear, is_out_of_memory


class Engine:
    """Generate with a hybrid model for many requests at once.

    Requests come and go between steps (continuous batching). Each `step` reads a piece of some
    prompts and writes a token for the others; `stream` and `generate` call it until theirs are
    done.

    Args:
        model: a LongGen causal language model, on its device.
        tokenizer: its tokenizer; None where prompts and results are token ids.
        max_length: the longest sequence, prompt and output; None takes the model's context.
        beyond_context: let `max_length` exceed that, to measure what the model does there.
        max_sequences: sequences that run at once.
        num_pages: pages of a full layer's cache; None has room for `max_sequences` of the longest.
        page_size: tokens a page.
        max_batched_tokens: tokens that go through the model in a step, at most.
        prefill_chunk: tokens of one prompt in a step, at most; None is the same number.
        kv_dtype: None keeps keys and values in the model's dtype, "fp8" in e4m3 with a scale a
            layer and head: half the bytes of bf16, at some loss.
        impl: the attention implementation (`longgen.attention`).
        enforce_eager: on a GPU, neither compile the model's layers nor record CUDA graphs: quicker
            to start, slower to run. On a CPU that is never done.

    Raises:
        UsageError: if the model is no hybrid, or a number makes no sense.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        beyond_context: bool = False,
        max_sequences: int = 8,
        num_pages: int | None = None,
        page_size: int = 128,
        max_batched_tokens: int = 8192,
        prefill_chunk: int | None = None,
        kv_dtype: str | None = None,
        impl: str = "auto",
        enforce_eager: bool = False,
    ) -> None:
        config: Any = check_model(model)
        context = config.max_position_embeddings
        check_limits(
            None if beyond_context else context,
            max_length=max_length,
            max_sequences=max_sequences,
            num_pages=num_pages,
            page_size=page_size,
            max_batched_tokens=max_batched_tokens,
            prefill_chunk=prefill_chunk,
        )
        dtype = check_kv_dtype(kv_dtype, model.dtype, model.device)
        max_length = max_length or context
        pages = -(-max_length // page_size)
        if num_pages is not None and num_pages < pages:
            max_length = num_pages * page_size
        self.model, self.tokenizer, self.impl = model.eval(), tokenizer, impl
        self.cache = EngineCache(
            config.layer_plan,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            num_pages=pages * max_sequences if num_pages is None else num_pages,
            page_size=page_size,
            num_slots=max_sequences,
            max_length=max_length,
            dtype=dtype,
            device=model.device,
        )
        self.scheduler = Scheduler(
            self.cache, max_batched_tokens, prefill_chunk or max_batched_tokens
        )
        self.sampler = Sampler()
        # On a CPU, batches of fixed shape would only cost.
        self.decode_runner: DecodeRunner | None = None
        if self.cache.device.type == "cuda" and not enforce_eager:
            compile_layers(model)
            self.cache.compile()
            self.decode_runner = DecodeRunner(model, self.cache)
        # By the layers as they will run: compiled ones round differently.
        set_scales(model, self.cache, impl)
        self.requests: dict[str, Request] = {}
        self._numbers = count()
        self._untold: list[RequestOutput] = []
        eos = getattr(model.generation_config, "eos_token_id", None)
        self.eos_token_ids = set([eos] if isinstance(eos, int) else eos or ())

    @property
    def max_length(self) -> int:
        """The longest sequence, prompt and output, in tokens."""
        return self.cache.max_length

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs, or something is left that no step has told yet."""
        return bool(self.requests or self._untold)

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a request.

        Args:
            prompt: text, or token ids.
            params: how to choose tokens and when to stop.
            request_id: its name; None makes one.

        Returns:
            its name.

        Raises:
            UsageError: if the prompt is empty, too long, or has tokens that the model doesn't know;
                or the name is taken.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise UsageError(f"params is {params!r}; give SamplingParams.")
        if request_id is None:
            # Somebody may have given a request one of these names.
            request_id = next(n for n in map(str, self._numbers) if n not in self.requests)
        if request_id in self.requests:
            raise UsageError(f"There is a request {request_id!r} already; give another name.")
        ids = self._encode(prompt)
        if params.stop and self.tokenizer is None:
            raise UsageError(
                f"stop is {list(params.stop)}, but the engine has no tokenizer to find text with. "
                "Give it one, or use stop_token_ids."
            )
        request = Request(
            request_id,
            ids,
            params,
            SamplingRow(params, ids),
            IncrementalDetokenizer(self.tokenizer) if self.tokenizer is not None else None,
            StopStrings(params.stop) if params.stop else None,
        )
        self.requests[request_id] = request
        self.scheduler.add(request)
        return request_id

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        ids: Any = prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("The engine has no tokenizer; give token ids instead of text.")
            check_text(prompt)
            ids = self.tokenizer(prompt)["input_ids"]
        return token_ids(ids, self.model.config.vocab_size, self.max_length)

    def cancel(self, request_id: str) -> None:
        """End a request and free what it holds at once; one that has ended is left alone."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request, "cancelled")

    def step(self) -> list[RequestOutput]:
        """Run the model once, and return what that brought each request."""
        batch = self.scheduler.schedule()
        failure: str | None = None
        try:
            if batch:
                self._run(batch)
        except BaseException as error:
            # Layers before the one that failed have stored their tokens already.
            self._read_anew(batch)
            if not is_out_of_memory(error):
                raise
            failure = str(error)
        if failure is not None:
            # Not above: there the exception's frames still hold tensors.
            clear(self.cache.device)
            self._out_of_memory(batch, failure)
        untold, self._untold = self._untold, []
        return untold

    def _run(self, batch: list[tuple[Request, int]]) -> None:
        # Prompts first: what decodes is one batch behind them.
        batch = sorted(batch, key=lambda item: self._decodes(*item))
        tokens: list[int] = []
        rows: list[int] = []
        writing: list[Request] = []
        spans: list[Span] = []
        decoding: list[Request] = []
        likeliest: list[int] | None = None
        ahead = False
        for request, length in batch:
            assert request.slot is not None
            request.is_sound = False
            start = request.num_cached
            if self._decodes(request, length):
                decoding.append(request)
            else:
                place = request.slot, request.block_table
                spans.append(Span(self.cache, start, length, *place))
            tokens += request.tokens(start, start + length)
            if length == request.num_left:
                rows.append(len(tokens) - 1)
                writing.append(request)
        # A prompt's last but one token, read by itself, brings no token: not the runner's.
        if self.decode_runner is not None and not spans and len(writing) == len(decoding):
            ahead = self.scheduler.goes_on(decoding)
            logits, likeliest = self.decode_runner(tokens, *self._places(decoding), ahead=ahead)
        else:
            decode = DecodeBatch.of(self.cache, *self._places(decoding))
            step = Step(self.cache, spans, decode if decoding else None, self.impl)
            logits = run(self.model, step, tokens, rows)
        chosen: list[int] = []
        if likeliest is not None and all(x.row.params.takes_likeliest for x in writing):
            chosen = likeliest
        elif writing:
            chosen = self.sampler.sample(logits, [request.row for request in writing]).tolist()
        for request, length in batch:
            request.num_cached += length
        self.scheduler.note(batch)
        for index, (request, token) in enumerate(zip(writing, chosen, strict=True)):
            if token < 0:
                self._end(request, "error", self.sampler.explain(logits[index], request.row))
                continue
            # What a pass that began ahead has stored of this token, nobody has seen a result of.
            request.is_sound = not ahead
            try:
                self._put(request, token)
            except Exception as failure:
                # A tokenizer that cannot write this text still writes the others'.
                request.detokenizer = None
                why = f"Token {token} could not be turned into text: {failure!r}"
                self._end(request, "error", why)

    @staticmethod
    def _decodes(request: Request, length: int) -> bool:
        """Whether a request's part of a step is one token after others that the cache holds."""
        return length == 1 and request.num_cached > 0

    @staticmethod
    def _places(requests: list[Request]) -> tuple[list[int], list[int], list[list[int]]]:
        """Return lengths with the new token, slots and block tables of decoding requests."""
        return (
            [request.num_cached + 1 for request in requests],
            [request.slot or 0 for request in requests],
            [request.block_table for request in requests],
        )

    def _read_anew(self, batch: list[tuple[Request, int]]) -> None:
        """Have requests read again from their starts, those first that were first."""
        order = {name: place for place, name in enumerate(self.requests)}
        running = (request for request, _ in batch if request.state is State.RUNNING)
        for request in sorted(running, key=lambda r: order[r.id], reverse=True):
            self.scheduler.recompute(request)

    def _out_of_memory(self, batch: list[tuple[Request, int]], error: str) -> None:
        """Have all tried again, in smaller steps and one by one; give up one that fails alone, with
        few tokens and twice."""
        lengths = [length for _, length in batch]
        sizes = self.scheduler.sizes
        if len(batch) == 1 and lengths[0] <= sizes.smallest:
            (request,) = (request for request, _ in batch)
            if request.failed_alone:
                sizes.restore()
                self._end(request, "error", f"Not enough memory for this request: {error}")
            request.failed_alone = True
            return
        sizes.shrink(lengths)
        if max(lengths) <= sizes.smallest:
            self.scheduler.suspects = [request for request, _ in batch]

    def _put(self, request: Request, token: int) -> None:
        """Add a chosen token to its request."""
        params = request.params
        is_end = token in params.stop_token_ids or (
            token in self.eos_token_ids and not params.ignore_eos
        )
        request.output.append(token)
        request.row.append(token)
        text = ""
        reason = "stop" if is_end else None
        if request.detokenizer is not None and not is_end:
            text = request.detokenizer.add(token)
            if request.stop_strings is not None:
                text, stopped = request.stop_strings.push(text)
                reason = "stop" if stopped else None
        if reason is None and (
            len(request.output) >= params.max_tokens or request.num_tokens >= self.max_length
        ):
            reason = "length"
        if reason is not None:
            text += self._rest(request, stopped=reason == "stop" and not is_end)
            if reason == "length" and request.stop_strings is not None:
                # What was held back may have been a stop string that could have gone on.
                reason = "stop" if request.stop_strings.matched is not None else reason
            self._end(request, reason, told=False)
        request.pieces.append(text)
        self._untold.append(RequestOutput(request.id, text, (token,), reason))

    def _rest(self, request: Request, stopped: bool) -> str:
        """Return the text that was held back in case more belonged to it."""
        if request.detokenizer is None or stopped:
            return ""
        rest = request.detokenizer.flush()
        if request.stop_strings is not None:
            rest, found = request.stop_strings.push(rest)
            rest += "" if found else request.stop_strings.flush()
        return rest

    def _end(
        self,
        request: Request,
        reason: str,
        error: str | None = None,
        *,
        told: bool = True,
    ) -> None:
        self.scheduler.remove(request)
        request.finish_reason, request.error = reason, error
        del self.requests[request.id]
        if told:
            text = self._rest(request, stopped=False)
            request.pieces.append(text)
            self._untold.append(RequestOutput(request.id, text, (), reason, error))

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Run one request and yield what each step brings it; closing the iterator cancels it.

        Other requests go on at the same time; what they bring meanwhile is not kept.
        """
        request_id = self.add_request(prompt, params)
        try:
            while request_id in self.requests:
                yield from (out for out in self.step() if out.id == request_id)
        finally:
            self.cancel(request_id)

    def generate(
        self,
        prompts: Iterable[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Run requests to their ends.

        Args:
            prompts: texts or token ids.
            params: for all, or one a prompt.

        Returns:
            the requests, in the order of the prompts, with `output`, `finish_reason` and, given a
            tokenizer, `text`.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is one text; give a list, or its letters would be prompts.")
        prompts = list(prompts)
        each = (
            [params] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(each) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts but {len(each)} params.")
        names: list[str] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                names.append(self.add_request(prompt, own))
            requests = [self.requests[name] for name in names]
            while any(request.state is not State.FINISHED for request in requests):
                self.step()
        except BaseException:
            for name in names:
                self.cancel(name)
            raise
        return requests
