"""Training: the fused loss inside the model, its gradients, checkpointing, the Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import longgen.hf.head as head

Make = Callable[..., Any]
EPS = torch.finfo(torch.float32).eps


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[:, 5:9] = -100
    return labels


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def trained(hybrid: Any) -> Any:
    hybrid.model.train()
    yield hybrid
    hybrid.model.eval()
    hybrid.model.zero_grad()


def test_loss_and_gradients_follow_from_the_definition(
    trained: Any, compute: Make, weights_of: Make, check_gradients: Make
) -> None:
    """Sparse layers included: against autograd through the decoder written out in fp64."""
    model, ids = trained.model, trained.rows[0]
    labels = next_tokens(ids[None])[0]
    losses, grads = {}, {}
    for dtype in (torch.float32, torch.float64):
        weights = weights_of(model, dtype)
        logits = compute(model.config, weights, ids)
        terms = F.cross_entropy(logits[:-1], labels[1:], reduction="none")
        losses[dtype] = terms.detach()
        (terms.sum() / (labels[1:] != -100).sum()).backward()
        grads[dtype] = {name: w.grad for name, w in weights.items()}
    counted = int((labels[1:] != -100).sum())
    out = model(ids[None], labels=labels[None])
    assert out.logits is None and out.loss.dtype == torch.float32
    exact = losses[torch.float64]
    total = float(exact.sum())
    budget = 2 * float((losses[torch.float32] - exact).abs().sum()) + len(ids) * EPS * total
    assert abs(float(out.loss.detach()) * counted - total) <= budget
    out.loss.backward()
    check_gradients(gradients(model), grads[torch.float32], grads[torch.float64])


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_loss_and_gradients_equal_the_base_models(
    build: Make,
    build_base: Make,
    tokens: Make,
    check_gradients: Make,
    family: str,
    tied: bool,
) -> None:
    """With every layer full; tied embeddings collect the gradients of both their uses."""
    base = build_base(family, tie_word_embeddings=tied).train()
    hybrid = build(family, layers="FFF", tie_word_embeddings=tied).train()
    hybrid.load_state_dict(base.state_dict())
    ids = tokens(2, 40)
    labels = next_tokens(ids)
    results = []
    for model in (hybrid, base, copy.deepcopy(base).double()):
        loss = model(ids, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, got), (eager, wanted), (exact, truth) = results
    # Means of at most 80 terms in fp32.
    assert abs(loss - exact) <= 2 * abs(eager - exact) + 80 * EPS * exact
    assert ("lm_head.weight" in got) != tied
    check_gradients(got, wanted, truth)


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(7.0)], ids=repr)
def test_the_loss_is_divided_by_num_items_in_batch(build: Make, tokens: Make, count: Any) -> None:
    """As the Trainer wants it under gradient accumulation; in evaluation mode too."""
    model, ids = build(), tokens(2, 30)
    labels = next_tokens(ids)
    counted = int((labels[:, 1:] != -100).sum())
    for training in (True, False):
        model.train(training)
        mean = model(ids, labels=labels).loss
        loss = model(ids, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, mean * counted / 7)


def test_shift_labels_are_those_of_the_next_token(build: Make, tokens: Make) -> None:
    model, ids = build(), tokens(2, 30)
    labels = next_tokens(ids)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    wanted = model.train()(ids, labels=labels).loss
    for training in (True, False):
        model.train(training)
        for both in ({}, {"labels": shifted}):
            out = model(ids, shift_labels=shifted, **both)
            assert torch.equal(out.loss, wanted) and out.logits is None


def test_models_that_return_tuples_train(build: Make, tokens: Make) -> None:
    model, ids = build().train(), tokens(2, 30)
    wanted = model(ids, labels=ids).loss
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], wanted)
    model.config.return_dict = False
    assert torch.equal(model(ids, labels=ids)[0], wanted)


def test_evaluation_gives_logits_and_the_same_loss(build: Make, tokens: Make) -> None:
    model, ids = build(), tokens(2, 30)
    out = model(ids, labels=next_tokens(ids))
    assert torch.equal(out.logits, model(ids).logits)
    torch.testing.assert_close(out.loss, model.train()(ids, labels=next_tokens(ids)).loss)


def test_padding_and_packing_in_training(build: Make, tokens: Make) -> None:
    """Both leave the loss of each document as it is alone."""
    model, ids = build().train(), tokens(2, 30)
    alone = [model(row[None], labels=row[None], num_items_in_batch=1).loss for row in ids]
    packed = torch.cat([ids[0], ids[1]])[None]
    labels = packed.clone()
    labels[0, 30] = -100
    positions = torch.arange(30).repeat(2)[None]
    loss = model(packed, labels=labels, position_ids=positions, num_items_in_batch=1).loss
    torch.testing.assert_close(loss, alone[0] + alone[1])
    padded = torch.cat([torch.full((2, 9), 5), ids], 1)
    mask = torch.cat([torch.zeros(2, 9).long(), torch.ones_like(ids)], 1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 9] = -100
    loss = model(padded, labels=labels, attention_mask=mask, num_items_in_batch=1).loss
    torch.testing.assert_close(loss, alone[0] + alone[1])


class LargestTensor(TorchDispatchMode):
    """Note the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_logits_of_the_whole_sequence_never_exist(
    build: Make, tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, vocabulary = 300, 2000
    model = build(vocab_size=vocabulary, layers="S").train()
    ids = tokens(1, length)
    with LargestTensor() as spy:
        model.eval()(ids)
    assert spy.elements == length * vocabulary, "the spy sees logits where they exist"
    monkeypatch.setattr(head, "_CHUNK_BYTES", 0)  # the smallest chunk, 64 tokens
    model.train()
    with LargestTensor() as spy:
        model(ids, labels=ids).loss.backward()
    assert spy.elements <= 64 * vocabulary
    with torch.no_grad(), LargestTensor() as spy:
        model.eval()(ids, shift_labels=ids)
    assert spy.elements <= 64 * vocabulary


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("use_cache", [None, True], ids=["", "use_cache"])
def test_gradient_checkpointing_changes_nothing(
    build: Make, tokens: Make, family: str, reentrant: bool, use_cache: bool | None
) -> None:
    model, ids = build(family).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=use_cache).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, wanted), (again, got) = results
    assert torch.equal(loss, again)
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_resized_vocabulary_still_trains(build: Make, tokens: Make, tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    ids = tokens(2, 30)
    model.resize_token_embeddings(120, mean_resizing=False)
    wanted = model(ids, labels=ids).loss
    torch.testing.assert_close(model.train()(ids, labels=ids).loss, wanted)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_replaced_head_still_trains(build: Make, tokens: Make) -> None:
    model, ids = build(), tokens(2, 30)
    model.set_output_embeddings(torch.nn.Linear(32, 50, bias=False))
    loss = model.train()(ids % 50, labels=ids % 50).loss
    loss.backward()
    assert model.lm_head.weight.grad.shape == (50, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(hybrid: Any, build: Make, dtype: torch.dtype) -> None:
    """Cached decoding stays at half precision and as near to fp64 as the uncached forward."""
    config = hybrid.model.config
    model = build(
        config.model_type.removeprefix("longgen_"),
        config.layer_plan.pattern,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        dtype=dtype,
    )
    model.load_state_dict(hybrid.model.state_dict())
    model.to(dtype)
    ids = hybrid.rows[0][None]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
        cache = model(ids[:, :50]).past_key_values
        steps = torch.cat(
            [model(t, past_key_values=cache).logits[0] for t in ids[:, 50:].split(1, 1)]
        )
    assert whole.dtype == steps.dtype == cache.layers[0].keys.dtype == dtype
    exact = hybrid.exact[0]
    assert (steps - exact[50:]).abs().max() <= 2 * (whole - exact).abs().max()
    loss = model.train()(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast(build: Make, tokens: Make) -> None:
    """fp32 weights under bf16 autocast: about the bf16 model's loss, and gradients in fp32."""
    model, ids = build().train(), tokens(2, 40)
    exact = model(ids, labels=ids).loss.detach()
    half = build().to(torch.bfloat16).train()(ids, labels=ids).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, output_hidden_states=True)
    out.loss.backward()
    assert abs(out.loss - exact) <= 2 * abs(half - exact) + torch.finfo(torch.bfloat16).eps * exact
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_trainer_trains_and_evaluates(build: Make, tokens: Make, tmp_path: Path) -> None:
    """With nothing set: token-exact accumulation, and an eval_loss that is reported."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = build()
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 30)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=2,
            learning_rate=1e-3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    model.eval()
    with torch.no_grad():
        before = model(tokens(4, 30), labels=tokens(4, 30)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(before), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < float(before)


def test_inference_does_not_spoil_a_later_backward(build: Make, tokens: Make) -> None:
    """What one call caches, the next may have to save for its gradients."""
    model, ids = build(), tokens(1, 57)
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_tuples_on_request(build: Make, tokens: Make, training: bool) -> None:
    model, ids = build().train(training), tokens(1, 20)
    loss = model(ids, labels=ids).loss
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], loss)
