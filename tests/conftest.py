"""What all tests share: one hypothesis profile, an independent oracle of visibility, fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from longgen.layout import PADDING, Axis, Layout
from longgen.pattern import SparsePattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

settings.register_profile(
    "longgen",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("longgen")


@st.composite
def _patterns(draw: st.DrawFn) -> SparsePattern:
    """Draw any kind of pattern, small enough that documents of some hundred tokens outgrow it."""
    stride = draw(st.sampled_from((0, 0, 1, 2, 3, 4, 5, 8)))
    return SparsePattern(
        block_size=draw(st.sampled_from((1, 3, 16, 64, 100, 128))),
        sink_blocks=draw(st.integers(0, 3)),
        local_blocks=draw(st.sampled_from((1, 1, 2, 3, 5, 9))),
        stride_blocks=stride,
        head_shift=draw(st.integers(0, 9)) if stride else 0,
    )


# Tests draw patterns with st.from_type(SparsePattern).
st.register_type_strategy(SparsePattern, _patterns())


@lru_cache(maxsize=64)
def _document_mask(pattern: SparsePattern, length: int, head: int) -> np.ndarray:
    number = -(-length // pattern.block_size)
    blocks = np.zeros((number, number), bool)
    for i in range(number):
        j = np.arange(i + 1)
        blocks[i, : i + 1] = (j < pattern.sink_blocks) | (i - j < pattern.local_blocks)
        if pattern.stride_blocks:
            shifted = j + head * pattern.head_shift
            blocks[i, : i + 1] |= shifted % pattern.stride_blocks == 0
    mask = blocks.repeat(pattern.block_size, 0).repeat(pattern.block_size, 1)
    mask = np.tril(mask[:length, :length])
    mask.flags.writeable = False
    return mask


@pytest.fixture(scope="session")
def document_mask() -> Callable[[SparsePattern, int, int], np.ndarray]:
    """Return the oracle of one document: (pattern, length, head) -> bool (length, length).

    It writes the design's formula down block by block and shares no code with `SparsePattern`.
    """
    return _document_mask


def _places(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    documents = [np.full(run.length, run.document) for run in axis]
    positions = [run.start + np.arange(run.length) for run in axis]
    return np.concatenate(documents), np.concatenate(positions)


def _layout_mask(
    pattern: SparsePattern, layout: Layout, num_key_value_heads: int, head_offset: int = 0
) -> torch.Tensor:
    rows = max(len(layout.queries), len(layout.keys))
    masks = []
    for row in range(rows):
        q_document, q = _places(layout.queries[row % len(layout.queries)])
        axes = layout.keys[row % len(layout.keys)]
        for head in range(num_key_value_heads):
            k_document, k = _places(axes[head % len(axes)])
            whole = _document_mask(pattern, int(max(q.max(), k.max())) + 1, head_offset + head)
            same = (q_document[:, None] == k_document) & (q_document != PADDING)[:, None]
            masks.append(whole[q][:, k] & same)
    stacked = np.stack(masks)
    return torch.from_numpy(stacked.reshape(rows, num_key_value_heads, *stacked.shape[1:]))


@pytest.fixture(scope="session")
def layout_mask() -> Callable[..., torch.Tensor]:
    """Return the oracle of a layout: (pattern, layout, num_key_value_heads, head_offset=0) -> bool
    (rows, Hkv, T, S)."""
    return _layout_mask


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Hold PyTorch to one thread a test process: the tests' tensors are too small to share out."""
    torch.set_num_threads(1)


@pytest.fixture
def nan_in_empty() -> Iterator[None]:
    """Fill memory that PyTorch hands out uninitialised with NaN: torch.empty and all its kin.

    Results that were never written then show up as NaN instead of as whatever lay there.
    """
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    before_fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn)
    torch.utils.deterministic.fill_uninitialized_memory = before_fill


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 262 tokens that encodes any text.

    It has <s> (bos) and </s> (eos), which it does not add by itself.
    """
    # Here, so that tests without a tokenizer do not wait for the import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # U+0120 is how byte-level tokenizers write a space.
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("i", "n")]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def make_checkpoint(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Return a maker of checkpoints: (folder, family="llama", dtype=float32, **config) -> folder.

    They are plain ones with random weights and the tiny tokenizer: by default 3 layers, 4 heads
    with 2 key/value heads, and 64 tokens of context.
    """
    import transformers

    def make(
        folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **fields: object
    ) -> Path:
        config = transformers.AutoConfig.for_model(
            family,
            **{
                "vocab_size": 272,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 64,
                **({"sliding_window": None} if family == "mistral" else {}),
                "bos_token_id": 0,
                "eos_token_id": 1,
                "initializer_range": 0.2,
                **fields,
            },
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(dtype).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a tiny Llama checkpoint, not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
