"""The Trainer's loss and order, the progress log, and which checkpoint counts as whole."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from transformers import TrainingArguments

import longgen
from longgen.accounting import training_flops
from longgen.data.recall import RecallText
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend
from longgen.train.saving import WHOLE, newest_checkpoint
from longgen.train.trainer import LongGenTrainer, Progress, TrainingSequences

CONTEXT = 96
# Documents in each of four sequences, and how many positions at the end are padding.
PACKED = (([96], 0), ([40, 56], 0), ([7, 3, 6], 80), ([1, 2, 1, 92], 0))


class Packed:
    """Serve sequences whose numbers of labels differ widely."""

    def item(self, index: int) -> dict[str, torch.Tensor]:
        documents, padding = PACKED[index]
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(2, 262, (CONTEXT,), generator=generator)
        positions = torch.cat([torch.arange(n) for n in (*documents, padding) if n])
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[torch.cat([positions[1:] == 0, torch.tensor([True])])] = -100
        labels[CONTEXT - padding :] = -100
        return {"input_ids": ids, "position_ids": positions, "shift_labels": labels}


@pytest.fixture
def hybrid(tiny_checkpoint: Path, settings: Callable[..., ExtendConfig]) -> Any:
    """Return an extended tiny model, ready to train."""
    config = settings(steps=1)
    extend(config, say=lambda line: None)
    return longgen.load_model(config.out, dtype=torch.float32, device="cpu").train()


def test_the_loss_is_the_mean_over_labelled_tokens_of_all_accumulated_sequences(
    hybrid: Any, tmp_path: Path
) -> None:
    # One document at a time, with no packing, no fused loss and no Trainer.
    total, count = torch.zeros((), dtype=torch.float64), 0
    reference = hybrid.eval()
    expected: dict[str, torch.Tensor] = {}
    for index, (documents, _) in enumerate(PACKED):
        start = 0
        for length in documents:
            ids = Packed().item(index)["input_ids"][start : start + length]
            start += length
            if length > 1:
                logits = reference(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
                total = total + F.cross_entropy(logits, ids[1:], reduction="sum")
                count += length - 1
    assert count == 95 + 94 + 13 + 92
    (total / count).backward()
    for name, parameter in hybrid.named_parameters():
        expected[name] = parameter.grad.clone()
    hybrid.zero_grad()

    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        # With this optimizer and rate a step is the negative gradient itself.
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    shape = ModelShape.from_config(hybrid.config)
    plan = hybrid.config.layer_plan
    progress = Progress(shape, plan, tmp_path, 1, None, lambda line: None)
    trainer = LongGenTrainer(
        model=hybrid.train(),
        args=arguments,
        train_dataset=TrainingSequences(Packed(), 4),
        data_collator=default_collate,
        callbacks=[progress],
    )
    trainer.progress = progress
    trainer.train()
    progress.release()
    loss = trainer.state.log_history[0]["loss"]
    # fp32 sums of 294 losses of about 10: relative rounding of a few 1e-7.
    assert loss == pytest.approx(float(total.detach() / count), rel=2e-6)
    for name, parameter in hybrid.named_parameters():
        step = before[name] - parameter.detach()
        scale = expected[name].abs().max()
        # The step is read off the weights: their own rounding comes on top of the gradient's.
        bound = 1e-5 * scale + 2 * torch.finfo(torch.float32).eps * before[name].abs().max()
        assert (step - expected[name]).abs().max() <= bound, name


def test_sequences_come_in_the_order_of_their_index() -> None:
    dataset = TrainingSequences(Packed(), 3)
    assert len(dataset) == 3
    item = dataset[2]
    assert torch.equal(item["labels"], item["shift_labels"])
    assert set(item) == {"input_ids", "position_ids", "shift_labels", "labels"}


def test_a_data_worker_does_not_wait_for_the_threads_of_its_parents_tokenizer(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    recall = RecallText(tiny_tokenizer, records_per_sequence=4)

    class Recalling:
        def item(self, index: int) -> dict[str, torch.Tensor]:
            rng = np.random.default_rng(index)
            ids = torch.from_numpy(recall.apply(np.full(2000, 5), rng))
            return {"input_ids": ids, "position_ids": torch.arange(2000), "shift_labels": ids}

    alone = TrainingSequences(Recalling(), 2)[1]
    loader = DataLoader(
        TrainingSequences(Recalling(), 2),
        batch_size=None,
        num_workers=1,
        timeout=30,
        multiprocessing_context="fork",
    )
    assert torch.equal(list(loader)[1]["input_ids"], alone["input_ids"])


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    shape = ModelShape(
        model_type="llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=262,
        max_position_embeddings=128,
    )
    return Progress(shape, LayerPlan.build(3), tmp_path, 1, None, lambda line: None)


def test_flops_are_counted_by_document(progress: Progress) -> None:
    rows = [Packed().item(index)["position_ids"] for index in (0, 1)]
    progress.count(torch.stack(rows))
    assert progress.tokens == 2 * CONTEXT
    assert progress.flops == sum(
        training_flops(progress.shape, progress.plan, length) for length in (96, 40, 56)
    )


class State:
    is_world_process_zero = True

    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo'])
def test_a_resumed_run_forgets_the_steps_it_will_do_again(progress: Progress, tail: str) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    progress.log_path.write_text("".join(lines) + tail)
    progress.on_train_begin(None, State(2), None)
    progress.release()
    assert progress.log_path.read_text() == "".join(lines[:2])


def test_only_a_checkpoint_with_its_mark_is_whole(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert newest_checkpoint(tmp_path)[0] is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    newest, cut_off = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert [path.name for path in cut_off] == ["checkpoint-100", "checkpoint-20"]


def test_data_workers_leave_ctrl_c_to_the_run(
    progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A terminal sends it to every process, and workers inherit the handler.
    with monkeypatch.context() as patch:
        patch.setattr("longgen.train.trainer.os.getpid", lambda: -1)
        progress._interrupt(signal.SIGINT, None)
    assert not progress.interrupted
    progress._interrupt(signal.SIGINT, None)
    assert progress.interrupted


def test_medians_leave_out_the_first_step(progress: Progress) -> None:
    assert progress.medians() == {"tokens_per_second": None, "mfu": None}
    for seconds in (100.0, 1.0, 2.0, 4.0):
        progress.speeds.append({"tokens": 10, "seconds": seconds, "flops": 1e9})
    progress.peak = 1e10
    assert progress.medians() == {"tokens_per_second": 5.0, "mfu": 0.05}
    assert np.isfinite(progress.flops)
