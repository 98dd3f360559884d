"""What LongGen adds to a transformers model: two mixins, for the decoder and for the causal
language model.

The decoder mixin turns the call's mask, positions and cache into layouts once, and hands them to
every layer as a keyword. No modeling file is copied: the layers are transformers' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from longgen.errors import UsageError
from longgen.hf.attention import LayerLayouts, check_attention_name
from longgen.hf.cache import CACHE_NAME, HybridCache, cache_layout
from longgen.hf.context import (
    context_layouts,
    labelled_tokens,
    refuse_in_shards,
    refuse_labels,
)
from longgen.hf.head import LMHead, shift
from longgen.layout import Axis, Layout, from_position_ids
from longgen.parallel import ContextGroup, ContextLayouts


def _one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache, by whichever of its two names it was given."""
    if past_key_values is not None and cache is not None:
        raise UsageError("Both past_key_values and cache were given; they are one thing, give one.")
    return past_key_values if cache is None else cache


def left_paddings(attention_mask: torch.Tensor, batch_size: int, length: int) -> tuple[int, ...]:
    """Return how many columns at the start of each row a 2-D attention mask (B, length) hides.

    Hidden columns at the end of a row need nothing: causal attention never looks ahead. Holes are
    refused.
    """
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) != (batch_size, length):
        raise UsageError(
            f"The attention mask has shape {tuple(attention_mask.shape)}; LongGen models take "
            f"({batch_size}, {length}): one entry a token, cached ones included. For packed "
            "documents pass position_ids that restart at 0."
        )
    visible = attention_mask.detach().to("cpu").numpy().astype(bool)
    if visible.all():
        return (0,) * batch_size
    first = np.where(visible.any(1), visible.argmax(1), length)
    last = np.where(visible.any(1), length - visible[:, ::-1].argmax(1), length)
    for row, (start, stop) in enumerate(zip(first, last, strict=True)):
        if not visible[row, start:stop].all():
            raise UsageError(
                f"Row {row} of the attention mask hides tokens in the middle of the sequence; only "
                "padding at the start or end of a row can be masked."
            )
    return tuple(int(start) for start in first)


def packed_rows(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[Axis, ...] | None:
    """Return each row's documents if `position_ids` (B or 1, T) restart somewhere.

    Returns None if every row is one document. Under a mask that hides padding (B, T), positions of
    hidden tokens do not count, and restarts among the others are refused.
    """
    rows = position_ids.detach().to("cpu").numpy()
    if rows.ndim != 2:
        return None
    counts_on = np.diff(rows, axis=1) == 1
    if counts_on.all() and (rows[:, 0] == 0).all():
        return None
    if attention_mask is not None:
        visible = attention_mask.detach().to("cpu").numpy().astype(bool)
        if visible.shape[1:] != rows.shape[1:]:
            return None  # a mask that the paddings' check will refuse
        if not visible.all():
            if not (counts_on | ~visible[:, 1:] | ~visible[:, :-1]).all():
                raise UsageError(
                    "position_ids restart within the tokens that the attention mask shows: packed "
                    "documents cannot be padded as well. Pack without padding, or leave "
                    "position_ids out."
                )
            return None
    return tuple(from_position_ids(row) for row in rows)


class _RefusesOtherAttention:
    """Keep a hybrid model from being run densely by a name given at load time or later."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        # Before transformers fetches a kernel by that name.
        check_attention_name(attn_implementation)
        return super()._check_and_adjust_attn_implementation(  # type: ignore[misc, no-any-return]
            attn_implementation, *args, **kwargs
        )

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        return check_attention_name(requested_attention)

    def set_attn_implementation(
        self, attn_implementation: str | dict, *args: Any, **kwargs: Any
    ) -> None:
        check_attention_name(
            attn_implementation.get("")
            if isinstance(attn_implementation, dict)
            else attn_implementation
        )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]


class HybridModelMixin(_RefusesOtherAttention):
    """Add layouts and the hybrid cache to a transformers decoder (`LlamaModel` and its like)."""

    config: Any
    training: bool
    # Families whose forward looks masks up by layer type want a dictionary.
    masks_by_layer_type: bool = False
    # Set by `set_context_parallel`: the processes that each hold a part of every row.
    context_group: ContextGroup | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        past_key_values = _one_cache(past_key_values, cache)
        # The config is shared and can be written to after the model was made.
        check_attention_name(self.config._attn_implementation)
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise UsageError("Give the model input_ids or inputs_embeds.")
        batch_size, length = tokens.shape[:2]
        if not length:
            raise UsageError("The input has no tokens; give at least one.")
        mask = dict.fromkeys(set(self.config.layer_types)) if self.masks_by_layer_type else None
        if kwargs.get("longgen_step") is not None:
            # An engine that keeps the cache itself, and knows where its tokens stand.
            return super().forward(  # type: ignore[misc, no-any-return]
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                **kwargs,
            )
        if self.context_group is not None:
            refuse_in_shards(attention_mask, past_key_values, use_cache)
            parts, position_ids = context_layouts(
                self.config.layer_plan, self.context_group, tokens, position_ids
            )
            return self._decode(input_ids, inputs_embeds, position_ids, mask, parts, **kwargs)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise UsageError(
                f"past_key_values is a {type(past_key_values).__name__}; a LongGen model drops "
                "tokens by its own rule and needs longgen.hf.HybridCache(model.config). Leave "
                "past_key_values out to get one."
            )
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        documents = None
        if position_ids is not None and not seen:
            documents = packed_rows(position_ids, attention_mask)
        if documents is not None:
            if past_key_values is not None:
                raise UsageError(
                    "The sequence is packed (position_ids restart), so there is no one document "
                    "for the cache to go on with. Pass use_cache=False, or one document a row."
                )
            use_cache = False
            layouts = self._packed_layouts(documents)
        else:
            if use_cache and past_key_values is None:
                past_key_values = HybridCache(self.config)
            paddings = self._paddings(attention_mask, past_key_values, batch_size, seen + length)
            layouts = self._layouts(paddings, seen, length)
            if position_ids is None and any(paddings):
                # transformers would count the padding; a cache must not see both ways of counting.
                columns = torch.arange(seen, seen + length, device=tokens.device)
                starts = torch.tensor(paddings, device=tokens.device)[:, None]
                position_ids = (columns - starts).clamp(min=0)
        return self._decode(
            input_ids,
            inputs_embeds,
            position_ids,
            mask,
            layouts,
            use_cache=use_cache,
            **{CACHE_NAME: past_key_values},
            **kwargs,
        )

    def _decode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        mask: Any,
        layouts: LayerLayouts | ContextLayouts,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run transformers' own forward with the layouts that its layers are to attend by."""
        if inputs_embeds is None:
            assert input_ids is not None
            kind = input_ids.device.type
            if torch.is_autocast_enabled(kind):
                # With fp32 master weights the residual stream would be fp32: twice the traffic, and
                # other rounding than the bf16 model that is served in the end (and than FSDP2,
                # which computes in bf16 throughout).
                dtype = torch.get_autocast_dtype(kind)
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids).to(dtype)  # type: ignore[attr-defined]
        return super().forward(  # type: ignore[misc, no-any-return]
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            longgen_layouts=layouts,
            **kwargs,
        )

    def _packed_layouts(self, documents: tuple[Axis, ...]) -> LayerLayouts:
        layout = Layout.of_rows(documents)
        return LayerLayouts(self.config.layer_plan, layout, layout)

    def _paddings(
        self,
        attention_mask: torch.Tensor | None,
        cache: HybridCache | None,
        batch_size: int,
        length: int,
    ) -> tuple[int, ...]:
        if attention_mask is None:
            return cache.paddings if cache is not None else (0,)
        paddings = left_paddings(attention_mask, batch_size, length)
        if cache is not None:
            cache.set_paddings(paddings)
        return paddings

    def _layouts(self, paddings: tuple[int, ...], seen: int, length: int) -> LayerLayouts:
        plan = self.config.layer_plan
        heads = self.config.num_key_value_heads
        full, sparse = (
            cache_layout(pattern, seen, length, paddings, heads)
            for pattern in (plan.full_pattern, plan.pattern)
        )
        return LayerLayouts(plan, full, sparse)


class HybridCausalLMMixin(_RefusesOtherAttention):
    """Add the fused loss and generation with the hybrid cache to a transformers causal language
    model."""

    config: Any
    model: Any
    lm_head: Any
    training: bool
    decoder_class: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # The base class has just built its own decoder and head; giving them our classes keeps
        # every parameter, name and tie as it is, on any device including meta.
        self.model.__class__ = self.decoder_class
        self.lm_head.__class__ = LMHead

    def set_context_parallel(self, group: ContextGroup | None) -> None:
        """Have this process take its part of every row from now on, or whole rows again (None).

        Inputs are then shards (`longgen.parallel.shard`) with their true `position_ids`, and the
        loss is this shard's share of the mean: the shares of all ranks add up to the loss of the
        rows, and their gradients (which must be added up too) to its gradient.
        """
        self.model.context_group = group

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model; with labels in training (or `shift_labels` at any time) return the loss
        and no logits.

        `labels` (B, T) are aligned with the inputs as everywhere in transformers; `shift_labels`
        (B, T) are already those of the next token. Logits of a long sequence would not fit, so they
        are never made on the way to a loss; in evaluation mode `labels` give logits and loss as
        usual.
        """
        kwargs[CACHE_NAME] = _one_cache(past_key_values, cache)
        # Not in the signature: the Trainer would then want both kinds of labels for an eval_loss.
        shift_labels = kwargs.pop("shift_labels", None)
        group = self.model.context_group
        if group is not None:
            refuse_labels(labels, shift_labels)
        if labels is not None and shift_labels is None and self.training:
            shift_labels = shift(labels)
        if shift_labels is None:
            if labels is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        as_tuple = kwargs.pop("return_dict", self.config.return_dict) is False
        kwargs["return_dict"] = True
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if type(self.lm_head) is torch.nn.Linear:
            # resize_token_embeddings and set_output_embeddings put a plain layer in its place.
            self.lm_head.__class__ = LMHead
        if group is not None and num_items_in_batch is None:
            num_items_in_batch = labelled_tokens(shift_labels, group)
        loss = self.lm_head(outputs.last_hidden_state, shift_labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return output.to_tuple() if as_tuple else output

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise UsageError(
                "Assisted decoding (assistant_model, prompt lookup) has to take tokens back, "
                "which a LongGen cache cannot: its sparse layers free what leaves their window. "
                "Generate without it."
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UsageError(
                f'cache_implementation="{generation_config.cache_implementation}" does not know '
                "the sparse layers. Leave it out: the hybrid cache is used, and it is smaller."
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            model_kwargs[CACHE_NAME] = HybridCache(self.config)
