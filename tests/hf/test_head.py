"""The fused loss: plain cross-entropy's numbers and gradients, and never the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import longgen.hf.head as head
from longgen.attention.testing import assert_within_eager_error
from longgen.hf import LMHead, linear_cross_entropy
from longgen.hf.head import _by_liger, fused_loss, shift

ROWS, WIDTH, VOCABULARY = 75, 24, 111


def draw(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[::7] = -100
    leaves = [normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH)] + [normal(VOCABULARY)] * bias
    return (targets, *leaves)


def naive(targets: torch.Tensor, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Any:
    """Give each token's loss; the logits are upcast as transformers does."""
    logits = F.linear(h, w, b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none")


def with_gradients(
    loss: Any, tensors: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves, *[None] * (3 - len(leaves)))
    return value.detach(), list(torch.autograd.grad(value.sum(), leaves))


@pytest.mark.parametrize("chunk", [1, 8, 13, 74, 75, 76, None])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_loss_and_gradients(dtype: Any, bias: bool, chunk: int | None) -> None:
    """Against autograd: the same dtype's error twice over, both measured by fp64."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    targets, *leaves = draw(torch.float32 if dtype == "autocast" else dtype, bias)
    exact, exact_grads = with_gradients(
        lambda h, w, b: naive(targets, h, w, b), [x.double() for x in leaves]
    )
    with autocast:
        eager, eager_grads = with_gradients(lambda h, w, b: naive(targets, h, w, b), leaves)
        loss, grads = with_gradients(
            lambda h, w, b: linear_cross_entropy(h, w, targets, b, chunk_tokens=chunk), leaves
        )
    assert loss.dtype == torch.float32 and loss.shape == ()
    # A sum may by luck be closer than its terms: its budget is theirs, and that of adding them up.
    rounding = ROWS * torch.finfo(torch.float32).eps * float(exact.sum())
    assert float((loss - exact.sum()).abs()) <= 2 * float((eager - exact).abs().sum()) + rounding
    for name, got, want, truth in zip("hwb", grads, eager_grads, exact_grads, strict=False):
        assert_within_eager_error(f"gradient of {name}", got, want, truth)


def test_fp64_gradients_are_the_losss_own() -> None:
    """In fp64 against autograd, to the fp32 that the loss is documented to be in."""
    targets, *leaves = draw(torch.float64, True)
    exact, exact_grads = with_gradients(lambda h, w, b: naive(targets, h, w, b), leaves)
    loss, grads = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, chunk_tokens=16), leaves
    )
    single = torch.finfo(torch.float32).eps
    assert float((loss - exact.sum()).abs()) <= ROWS * single * float(exact.sum())
    for got, truth in zip(grads, exact_grads, strict=True):
        assert got.dtype == torch.float64
        # A gradient is a sum of at most VOCABULARY products.
        assert float((got - truth).abs().max()) <= VOCABULARY * single * float(truth.abs().max())


def test_weight_gradients_of_many_chunks_add_up() -> None:
    """A sum in half precision stops growing after some hundred terms; it has to be in fp32."""
    h = torch.ones(1000, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(h, w, torch.zeros(1000, dtype=torch.long), chunk_tokens=1).backward()
    assert w.grad.tolist() == [[-500.0], [500.0]]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    targets, *leaves = draw(torch.float32, True)
    _, every = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, targets, b), leaves)
    own = [x.clone().requires_grad_(index != frozen) for index, x in enumerate(leaves)]
    linear_cross_entropy(own[0], own[1], targets, own[2], chunk_tokens=16).backward()
    for index, (leaf, want) in enumerate(zip(own, every, strict=True)):
        if index == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, want)


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    targets, *leaves = draw(torch.float32, False)
    _, once = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, targets), leaves)
    _, scaled = with_gradients(lambda h, w, b: -4 * linear_cross_entropy(h, w, targets), leaves)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(-4 * a, b)


def test_ignored_rows_do_not_count() -> None:
    targets, h, w = draw(torch.float32, False)
    real = targets != -100
    loss, (grad, _) = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, targets), [h, w])
    alone = linear_cross_entropy(h[real], w, targets[real])
    torch.testing.assert_close(loss, alone)
    assert (grad[~real] == 0).all() and (grad[real] != 0).any(1).all()


def test_no_labels_at_all() -> None:
    targets, h, w = draw(torch.float32, False)
    layer = LMHead(WIDTH, VOCABULARY, bias=False)
    assert float(layer(h, torch.full_like(targets, -100)).detach()) == 0.0
    assert float(linear_cross_entropy(h[:0], w, targets[:0])) == 0.0


@pytest.mark.parametrize("label", [-1, -99, VOCABULARY])
def test_labels_outside_the_vocabulary_are_not_taken_for_others(label: int) -> None:
    targets, h, w = draw(torch.float32, False)
    targets[3] = label
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        linear_cross_entropy(h, w, targets)


class Spy(TorchDispatchMode):
    """Note the largest tensor that any operation makes, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


def test_the_spy_sees_whole_logits() -> None:
    targets, h, w = draw(torch.float32, False)
    with Spy() as spy:
        naive(targets, h, w, None)
    assert spy.largest == ROWS * VOCABULARY and spy.products == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_logits_never_exist(dtype: torch.dtype) -> None:
    targets, h, w = draw(dtype, False)
    h, w = h.requires_grad_(), w.requires_grad_()
    with Spy() as spy:
        linear_cross_entropy(h, w, targets, chunk_tokens=16).backward()
    assert spy.largest <= max(16 * VOCABULARY, VOCABULARY * WIDTH)


def test_the_default_chunk_is_half_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []

    def take(h: Any, w: Any, b: Any, targets: Any, chunk: int, grad: bool) -> torch.Tensor:
        chunks.append(chunk)
        return h.sum()

    monkeypatch.setattr(head._LinearCrossEntropy, "apply", take)
    for words in (32_000, 49_152, 151_936, 10**8):
        linear_cross_entropy(torch.zeros(1, 1), torch.zeros(1, 1).expand(words, 1), torch.zeros(1))
    assert chunks == [2**29 // (4 * 32_000), 2**29 // (4 * 49_152), 2**29 // (4 * 151_936), 64]


def test_evaluation_computes_no_gradients() -> None:
    targets, h, w = draw(torch.float32, False)
    with torch.no_grad(), Spy() as spy:
        linear_cross_entropy(h.requires_grad_(), w.requires_grad_(), targets, chunk_tokens=25)
    assert spy.products == 3, "one product a chunk, for the logits"


def test_head_gives_logits_or_loss() -> None:
    targets, h, _ = draw(torch.float32, False)
    layer = LMHead(WIDTH, VOCABULARY)
    logits = layer(h.view(3, 25, WIDTH))
    assert torch.equal(logits, F.linear(h.view(3, 25, WIDTH), layer.weight, layer.bias))
    labels = targets.view(3, 25)
    exact = F.cross_entropy(logits.double().flatten(0, 1), targets, reduction="sum")
    counted = int((targets != -100).sum())
    # Sums of ROWS numbers in fp32.
    near = {"rtol": ROWS * torch.finfo(torch.float32).eps, "atol": 0.0}
    for items, divisor in ((None, counted), (10, 10), (torch.tensor(10), 10)):
        loss = layer(h.view(3, 25, WIDTH), labels, items)
        torch.testing.assert_close(loss.double(), exact / divisor, **near)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_ligers_function_is_asked_for_the_same_loss(bias: bool, autocast: bool) -> None:
    """With a stand-in of Liger's signature, which needs a GPU: it gets one dtype and no autocast,
    and its gradients arrive in the leaves' own."""
    targets, *leaves = draw(torch.float32, bias)
    asked: dict[str, Any] = {}

    def liger(h: Any, w: Any, target: Any, b: Any = None, **options: Any) -> torch.Tensor:
        asked.update(options, dtypes={x.dtype for x in (h, w, b) if x is not None})
        assert not torch.is_autocast_enabled("cpu")
        return naive(target, h, w, b).sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, grads = with_gradients(lambda h, w, b: _by_liger(liger, h, w, targets, b), leaves)
        same, same_grads = with_gradients(
            lambda h, w, b: linear_cross_entropy(h, w, targets, b), leaves
        )
    assert asked == {
        "ignore_index": -100,
        "reduction": "sum",
        "accum_dtype": torch.float32,
        "dtypes": {torch.bfloat16 if autocast else torch.float32},
    }
    assert loss.dtype == torch.float32
    # The stand-in's logits, of up to 16, are rounded to bf16: to 2 ** -5, and so is their exp.
    bound = 2**-5 if autocast else 1e-5
    torch.testing.assert_close(loss, same, rtol=bound, atol=0)
    for got, want in zip(grads, same_grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= bound * want.abs().max()


def test_on_a_cpu_the_loss_is_the_chunked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "liger_loss", lambda: pytest.fail("asked for Liger"))
    targets, *leaves = draw(torch.float32, False)
    assert torch.equal(fused_loss(*leaves, targets), linear_cross_entropy(*leaves, targets))


def test_shift() -> None:
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]
