"""A tiny model and tiny tokenizers, made on the spot."""

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longgen.convert import hybrid_config
from longgen.evaluate.needle import ANSWER, CITIES, NEEDLE, QUESTION
from longgen.hf import LongGenLlamaForCausalLM
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

MARK = "\u2581"  # what SentencePiece writes for a space
TEXT = [
    template.format(city=city, number=number)
    for template in (NEEDLE, QUESTION, ANSWER)
    for city in CITIES.split()
    for number in ("482913", "777482", "913135")
]


def train(tokenizer: Tokenizer) -> Tokenizer:
    special = ["<s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_level(*, split_digits: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte])
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer)


def starting_with_bos() -> Tokenizer:
    tokenizer = byte_level(split_digits=False)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def marking_word_starts() -> Tokenizer:
    """Give a tokenizer that puts a space before any text, one that begins with a space too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    train(tokenizer)
    marks = [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.pre_tokenizer = None
    return tokenizer


def across_words() -> Tokenizer:
    """Give a tokenizer that may fuse the end of the question with the start of the answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer)


KINDS = {
    "split-digits": lambda: byte_level(split_digits=True),
    "merged-digits": lambda: byte_level(split_digits=False),
    "bos": starting_with_bos,
    "word-starts": marking_word_starts,
    "across-words": across_words,
}


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: wrap(make()) for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["split-digits"]


FIELDS = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # large enough for confident, position-dependent predictions
    "eos_token_id": None,
    "bos_token_id": None,
}


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()


@pytest.fixture(scope="session")
def hybrid() -> LongGenLlamaForCausalLM:
    """Return a hybrid of one sparse and one full layer, with a context of 192 tokens."""
    torch.manual_seed(0)
    plan = LayerPlan("SF", SparsePattern(block_size=16, sink_blocks=1, local_blocks=2))
    config = hybrid_config(LlamaConfig(**{**FIELDS, "max_position_embeddings": 192}), plan)
    return LongGenLlamaForCausalLM(config).eval()
