"""Extension runs on a tiny model: what they learn, write and refuse."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longgen
from longgen.checkpoint import RECORD
from longgen.data.corpus import TokenizedCorpus
from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup
from longgen.plan import LayerPlan
from longgen.rope import rope_theta_for
from longgen.train import export as export_module
from longgen.train import extend as extend_module
from longgen.train.config import ExtendConfig
from longgen.train.extend import HELDOUT, extend, training_folder
from longgen.train.saving import OPTIMIZER, WEIGHTS, newest_checkpoint
from longgen.train.trainer import LongGenTrainer, TrainingSequences
from longgen.training_setup import CHECKPOINTING

Settings = Callable[..., ExtendConfig]


def quiet(line: str) -> None:
    pass


def log(config: ExtendConfig) -> list[dict[str, Any]]:
    lines = (training_folder(config.out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config: ExtendConfig) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in log(config)]


def test_a_run_learns_and_leaves_a_whole_hybrid(
    settings: Settings, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    config = settings(model=str(base), steps=20, recall_share=0.5, recall_records=1)
    lines: list[str] = []
    record = extend(config, say=lines.append)
    steps = [loss for _, loss in losses(config)]
    assert len(steps) == 20
    # An untrained model is at log(262) or worse; the text is a handful of words.
    assert steps[0] > 5 and np.mean(steps[-3:]) < 0.6 * steps[0]
    assert any(line.startswith("step 20/20  loss ") for line in lines)

    assert record == json.loads((Path(config.out) / RECORD).read_text())
    assert record["finished"] is True and record["kind"] == "extend"
    assert record["config"] == config.to_dict()
    assert record["original_context"] == 64
    assert record["rope_theta"] == rope_theta_for(10000.0, 64, 128, 8)
    assert record["data"]["documents"] == 24 and record["versions"]["torch"] == torch.__version__
    training = record["training"]
    assert training["step"] == 20 and training["tokens"] == 20 * 512
    assert training["first_loss"] == steps[0]
    assert training["last_loss"] == pytest.approx(np.mean(steps[-10:]))

    model = AutoModelForCausalLM.from_pretrained(config.out, dtype="auto")
    assert model.config.model_type == "longgen_llama"
    assert model.config.layer_plan == LayerPlan("SFS", model.config.layer_plan.pattern)
    assert model.config.layer_plan.pattern.to_dict() == config.pattern
    assert model.config.max_position_embeddings == 128
    assert model.config.rope_parameters["rope_theta"] == record["rope_theta"]
    assert model.config.use_cache
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(config.out)("the rain")["input_ids"]
    trained = model.get_input_embeddings().weight
    before = longgen.load_model(base, dtype="auto").get_input_embeddings().weight
    assert not torch.equal(trained, before)

    heldout = np.load(training_folder(config.out) / HELDOUT)
    corpus = TokenizedCorpus.open(training_folder(config.out) / "corpus")
    assert len(heldout) + record["packing"]["tokens"] == corpus.num_tokens


def test_gradient_checkpointing_changes_nothing(settings: Settings) -> None:
    kinds = [(mode, False) for mode in CHECKPOINTING] + [("selective", True)]
    runs = [
        settings(f"{mode}-{offload}", steps=3, gradient_checkpointing=mode, offload=offload)
        for mode, offload in kinds
    ]
    for config in runs:
        training = extend(config, say=quiet)["training"]
        assert training["gradient_checkpointing"] == config.gradient_checkpointing
    for config in runs[1:]:
        assert losses(config) == losses(runs[0])
        assert_same_weights(config, runs[0])


def assert_same_weights(first: ExtendConfig, second: ExtendConfig) -> None:
    one, other = (AutoModelForCausalLM.from_pretrained(c.out).state_dict() for c in (first, second))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class Recorder:
    """Note which sequences the Trainer asks for, and crash while it saves one checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, crash_at: int | None = None) -> None:
        self.indices: list[int] = []
        sequences, trainer = TrainingSequences, LongGenTrainer
        get, save = sequences.__getitem__, trainer._save_optimizer_and_scheduler

        def recorded(dataset: Any, index: int) -> Any:
            self.indices.append(index)
            return get(dataset, index)

        def crashing(this: Any, folder: Any) -> None:
            if this.state.global_step == crash_at:
                raise RuntimeError("power cut")
            save(this, folder)

        monkeypatch.setattr(sequences, "__getitem__", recorded)
        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", crashing)


def run_recorded(config: ExtendConfig, *, resume: bool = False, say: Any = quiet) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        assert extend(config, resume=resume, say=say)["finished"]
    return recorder.indices


def test_a_crash_while_saving_costs_only_the_steps_since_the_last_checkpoint(
    settings: Settings,
) -> None:
    whole, crashed = settings("whole"), settings("crashed")
    order = run_recorded(whole)
    assert order == list(range(24))

    with pytest.MonkeyPatch.context() as patch:
        Recorder(patch, crash_at=4)
        with pytest.raises(RuntimeError, match="power cut"):
            extend(crashed, say=quiet)
    folder = training_folder(crashed.out)
    assert (folder / "checkpoint-4" / WEIGHTS / ".metadata").exists()
    assert [entry["step"] for entry in log(crashed)] == [1, 2, 3, 4]
    assert not (Path(crashed.out) / "config.json").exists()
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')

    lines: list[str] = []
    again = run_recorded(crashed, resume=True, say=lines.append)
    assert any("checkpoint-4 was cut off" in line for line in lines)
    assert "resuming from checkpoint-2" in lines
    # Two steps of four sequences are done; the rest comes in the same order.
    assert again == order[8:]
    assert losses(crashed) == losses(whole)
    assert_same_weights(crashed, whole)


def test_a_run_that_stopped_before_its_first_checkpoint_starts_over(settings: Settings) -> None:
    whole, crashed = settings("whole", steps=2), settings("crashed", steps=2)
    extend(whole, say=quiet)
    with pytest.MonkeyPatch.context() as patch:
        Recorder(patch, crash_at=2)
        with pytest.raises(RuntimeError):
            extend(crashed, say=quiet)
    lines: list[str] = []
    extend(crashed, resume=True, say=lines.append)
    assert "no checkpoint yet: starting over" in lines
    assert losses(crashed) == losses(whole)
    assert_same_weights(crashed, whole)


def test_a_run_cut_off_while_the_model_was_written_only_writes_it_again(settings: Settings) -> None:
    whole, cut = settings("whole", steps=2), settings("cut", steps=2)
    extend(whole, say=quiet)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "save_hybrid", stop)
        with pytest.raises(KeyboardInterrupt):
            extend(cut, say=quiet)
    # The worst moment: all files but the last one, config.json, are in place.
    shutil.copy(Path(whole.out) / RECORD, Path(cut.out) / RECORD)
    assert run_recorded(cut, resume=True) == []
    assert losses(cut) == losses(whole)
    assert_same_weights(cut, whole)


@pytest.mark.parametrize(
    "file",
    [f"{WEIGHTS}/__0_0.distcp", f"{OPTIMIZER}/.metadata", "scheduler.pt", "trainer_state.json"],
)
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_used(
    settings: Settings, file: str
) -> None:
    config = settings()
    extend(config, say=quiet)
    steps = losses(config)
    (Path(config.out) / "config.json").unlink()
    damaged = training_folder(config.out) / "checkpoint-6"
    (damaged / file).write_bytes((damaged / file).read_bytes()[:30])
    with pytest.raises(UsageError, match=r"checkpoint-6 cannot be read \(.*remove that folder"):
        extend(config, resume=True, say=quiet)
    shutil.rmtree(damaged)
    lines: list[str] = []
    extend(config, resume=True, say=lines.append)
    assert "resuming from checkpoint-4" in lines
    assert losses(config) == steps


def test_resuming_with_other_settings_names_them(settings: Settings) -> None:
    config = settings(steps=2)
    with pytest.MonkeyPatch.context() as patch:
        Recorder(patch, crash_at=2)
        with pytest.raises(RuntimeError):
            extend(config, say=quiet)
    with pytest.raises(UsageError, match=r"learning_rate was 0.01 and is now 0.02"):
        extend(replace(config, learning_rate=0.02), resume=True, say=quiet)
    with pytest.raises(UsageError, match=r"seed was 0 and is now 1; .*steps|steps .* seed"):
        extend(replace(config, steps=3, seed=1), resume=True, say=quiet)
    with pytest.raises(UsageError, match="unfinished run; add --resume"):
        extend(config, say=quiet)
    # How often it saves and reports does not make it another run.
    assert extend(replace(config, save_steps=50, log_steps=2), resume=True, say=quiet)["finished"]
    with pytest.raises(UsageError, match="is finished"):
        extend(config, resume=True, say=quiet)
    with pytest.raises(UsageError, match="is finished"):
        extend(config, say=quiet)


def test_resuming_with_another_tokenizer_is_refused(
    settings: Settings, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    config = settings(model=str(base), steps=2)
    with pytest.MonkeyPatch.context() as patch:
        Recorder(patch, crash_at=2)
        with pytest.raises(RuntimeError):
            extend(config, say=quiet)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="The corpus was tokenized with"):
        extend(config, resume=True, say=quiet)


def test_resuming_where_nothing_ran_is_refused(settings: Settings) -> None:
    config = settings()
    with pytest.raises(UsageError, match="no run to resume"):
        extend(config, resume=True, say=quiet)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("exists", [False, True])
def test_what_is_found_out_late_leaves_nothing_behind(settings: Settings, exists: bool) -> None:
    config = settings(steps=1000)
    if exists:
        Path(config.out).mkdir()
    with pytest.raises(UsageError, match="too little data"):
        extend(config, say=quiet)
    assert Path(config.out).exists() == exists
    assert not exists or not any(Path(config.out).iterdir())
    assert extend(replace(config, steps=1), say=quiet)["finished"]


def test_ctrl_c_while_tokenizing_leaves_nothing_behind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extend_module, "split_heldout", stop)
    config = settings()
    with pytest.raises(KeyboardInterrupt):
        extend(config, say=quiet)
    assert not Path(config.out).exists()


def test_more_steps_than_data_repeat_it_if_allowed(settings: Settings, text: Path) -> None:
    config = settings(data=(str(text / "20.txt"),), steps=10, allow_repeat=True)
    lines: list[str] = []
    record = extend(config, say=lines.append)
    assert record["packing"]["rows"] < config.num_sequences
    assert len(losses(config)) == 10


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the estimate, and nothing else, see a GPU of 2 GiB."""
    group = GpuGroup(1, Gpu(name="Tiny Card", memory_bytes=2 << 30))
    monkeypatch.setattr(extend_module, "machine_gpus", lambda: group)


@pytest.mark.usefixtures("small_gpu")
def test_too_little_memory_is_refused_with_numbers_unless_forced(settings: Settings) -> None:
    config = settings(context=1 << 20, batch_tokens=1 << 20, steps=1)
    with pytest.raises(UsageError, match=r"1,048,576 tokens needs about .* GiB.*2\.0 GiB.*--force"):
        extend(config, say=quiet)
    assert not Path(config.out).exists()
    with pytest.raises(UsageError, match="too little data"):
        extend(replace(config, force=True), say=quiet)


@pytest.mark.usefixtures("small_gpu")
def test_auto_checkpoints_only_where_the_estimate_asks_for_it(settings: Settings) -> None:
    training = extend(settings("fits", steps=1), say=quiet)["training"]
    assert training["gradient_checkpointing"] == "off"


def test_what_broken_gradients_moved_is_not_saved(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step tells of the weights before it."""
    step = LongGenTrainer.training_step

    def breaking(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(trainer, model, *args, **kwargs)
        if trainer.state.global_step == 3:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(LongGenTrainer, "training_step", breaking)
    config = settings()
    with pytest.raises(UsageError, match="gradients' norm became nan at step 4"):
        extend(config, say=lambda line: None)
    newest, cut_off = newest_checkpoint(training_folder(config.out))
    assert newest is not None and newest.name == "checkpoint-2" and not cut_off


def test_a_diverged_run_is_no_hybrid(settings: Settings) -> None:
    """The checkpoints from before stay; a model of NaN is not written."""
    config = settings(steps=6, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(
        UsageError, match=r"(loss|norm) became (nan|inf) at step .*lower learning rate"
    ):
        extend(config, say=quiet)
    assert not (Path(config.out) / "config.json").exists()


def test_dropout_of_the_base_does_not_stop_training(
    settings: Settings, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", attention_dropout=0.1)
    assert extend(settings(model=str(base), steps=1), say=quiet)["finished"]


def test_more_records_than_there_are_keys_are_refused_before_anything_is_read(
    settings: Settings,
) -> None:
    config = settings(recall_share=1.0, recall_records=1_000_000)
    lines: list[str] = []
    with pytest.raises(UsageError, match="1000000, but must be from 1 to 10,000"):
        extend(config, say=lines.append)
    assert lines == [] and not Path(config.out).exists()


def test_a_seed_that_nothing_takes_is_refused(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"seed is 4294967296; give a number below"):
        settings(seed=1 << 32)
