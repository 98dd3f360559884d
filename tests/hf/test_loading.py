"""Loading elsewhere: in processes that never imported longgen, with weights spread over devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longgen

Make = Callable[..., Any]

# Runs where longgen is not imported, and at first cannot be.
STRANGER = """
import sys
from transformers import AutoModelForCausalLM
import torch

checkpoint, ids, root = sys.argv[1:]
assert "longgen" not in sys.modules


class Absent:
    def find_spec(self, name, *args):
        if name.partition(".")[0] == "longgen":
            raise ModuleNotFoundError("No module named 'longgen'", name="longgen")


def refused(trust):
    try:
        AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit(f"loaded with trust_remote_code={trust}")


print("untrusted:", " ".join(refused(None).split()))
print("distrusted:", " ".join(refused(False).split()))
sys.meta_path.insert(0, Absent())
print("absent:", " ".join(refused(True).split()))
del sys.meta_path[0]
sys.path.insert(0, root)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
import longgen.hf

assert type(model) is longgen.hf.LongGenLlamaForCausalLM, type(model)
assert model.config._attn_implementation == "longgen"
torch.set_num_threads(1)
saved = torch.load(ids)
assert torch.equal(model(saved["ids"]).logits, saved["logits"])
print("loaded")

# transformers notes what a class can record when a model of it is built, for the whole process.
# Only here, where no decoder was built alone, does it show whether ours are known.
for config_class in longgen.hf.CONFIG_CLASSES.values():
    small = config_class(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, intermediate_size=32, vocab_size=128)
    model = AutoModelForCausalLM.from_config(small)
    states = model(saved["ids"], output_hidden_states=True).hidden_states
    assert states is not None and len(states) == 3, small.model_type
print("recorded")
"""


def test_a_process_that_never_imported_longgen(build: Make, tokens: Make, tmp_path: Path) -> None:
    """It raises, naming what is missing, or loads our classes through the stubs."""
    model, ids = build(), tokens(1, 50)
    model.save_pretrained(tmp_path / "hybrid")
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "ids.pt")
    (tmp_path / "stranger.py").write_text(STRANGER)
    root = str(Path(longgen.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "stranger.py", "hybrid", "ids.pt", root],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    for expected in (
        r"untrusted: .*trust_remote_code",
        r"distrusted: .*trust_remote_code",
        r"absent: ImportError.*pip install longgen",
    ):
        assert re.search(expected, ran.stdout), ran.stdout
    assert ran.stdout.splitlines()[-2:] == ["loaded", "recorded"]


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, OFFLOADED], ids=str)
def test_device_maps(model: Any, tokens: Make, tmp_path: Path, device_map: Any) -> None:
    """Weights on disk between uses included: layouts and caches pass through accelerate's hooks."""
    pytest.importorskip("accelerate")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("the map would use the GPU")
    model.save_pretrained(tmp_path / "hybrid")
    mapped = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hybrid", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    if device_map is OFFLOADED:
        assert mapped.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    ids, options = tokens(2, 40), {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(mapped(ids).logits, model(ids).logits)
        assert torch.equal(mapped.generate(ids, **options), model.generate(ids, **options))
        wanted = model.train()(ids, labels=ids).loss
        model.eval()
        assert torch.equal(mapped.train()(ids, labels=ids).loss, wanted)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_dtypes_at_load(model: Any, tokens: Make, tmp_path: Path, dtype: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    with torch.no_grad():
        out = loaded(tokens(1, 30))
    assert out.logits.dtype == out.past_key_values.layers[0].keys.dtype == wanted
