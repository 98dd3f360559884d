"""The main job: convert a checkpoint and continue training it at the target length."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from longgen import __version__
from longgen.accounting import check_fits, fits, training_memory
from longgen.checkpoint import (
    check_weights,
    load_tokenizer,
    read_config,
    refuse_hybrid,
    write_json,
)
from longgen.convert import hybrid_config, load_as_hybrid, save_hybrid
from longgen.data.corpus import (
    INFO_FILE,
    CorpusView,
    TokenizedCorpus,
    check_vocabulary,
    default_heldout,
    split_heldout,
)
from longgen.data.mixture import Mixture
from longgen.data.packing import PackedDataset
from longgen.data.sources import Documents, read_documents
from longgen.data.tokenized import tokenize_documents
from longgen.errors import UsageError
from longgen.evaluate.results import card_name, versions
from longgen.gpus import machine_gpus
from longgen.parallel import check_divides
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.config import ExtendConfig, check_context
from longgen.train.data import mixture_of, recall_text, remember_data, say_mixture
from longgen.train.folder import HELDOUT, RUN, check_folder, training_folder
from longgen.train.processes import Processes
from longgen.train.trainer import (
    LongGenTrainer,
    Progress,
    Say,
    TrainingSequences,
    newest_checkpoint,
)


def extend(config: ExtendConfig, *, resume: bool = False, say: Say = print) -> dict[str, Any]:
    """Extend a model's context: convert, train, and write the hybrid to `config.out`.

    Under torchrun every process calls this. `context_parallel` neighbours share each sequence, the
    groups of them share a step's sequences, and each process holds the whole model. `config.out`
    must be the same folder for all.

    Ctrl-C stops after the step in hand with a checkpoint; `resume` goes on from the newest whole
    one, with the data, order and losses that the uninterrupted run would have had.

    Args:
        config: the settings.
        resume: go on with the run in `config.out`.
        say: prints one line of progress.

    Returns:
        The record that is written beside the model, with "finished" False if the run was
        interrupted.

    Raises:
        UsageError: for anything that the user can put right; nothing is written then.
    """
    processes = Processes.start(config.context_parallel)
    check_divides(config.context, config.context_parallel)
    if config.sequences_per_step % processes.data_parallel:
        raise UsageError(
            f"A step has {config.sequences_per_step} sequences, which {processes.data_parallel} "
            "groups of processes cannot share equally; change batch_tokens or context_parallel."
        )
    if not processes.is_first:
        say = _silent
    base = read_config(config.model)
    refuse_hybrid(base, config.model)
    check_context(config.context, base.max_position_embeddings, config.model)
    plan = LayerPlan(config.layers, SparsePattern.from_dict(config.pattern))
    # Refuses here, before anything is written, what it would refuse once the data are tokenized.
    hybrid_config(base, plan, context=config.context, rope_theta=config.rope_theta)
    check_weights(config.model)
    shape = ModelShape.from_config(base)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, base.vocab_size)
    checkpointing, planned = _fit(config, shape)
    mixture = mixture_of(config, tokenizer)
    documents = None
    if mixture is None:
        documents = processes.first(lambda: None if resume else _documents(config), lambda: None)
    folder, created = training_folder(config.out), not Path(config.out).exists()
    checkpoint = processes.first(
        lambda: _begin(config, resume, say),
        lambda: newest_checkpoint(folder)[0] if resume else None,
    )
    try:
        packed: PackedDataset | Mixture
        if mixture is not None:
            packed, text = mixture, mixture.heldout(config.heldout_tokens or 16 * config.context)
            processes.first(lambda: remember_data(folder, mixture, resume), lambda: None)
        else:
            corpus = processes.first(
                lambda: _corpus(config, tokenizer, documents, say),
                lambda: TokenizedCorpus.open(folder / "corpus"),
            )
            train, heldout = _split(config, corpus)
            text = np.concatenate([heldout.document(i) for i in range(len(heldout))])
            packed = PackedDataset(
                train,
                context=config.context,
                seed=config.seed,
                recall=recall_text(config, tokenizer),
                recall_share=config.recall_share,
            )
        packed.check_enough(config.num_sequences, allow_repeat=config.allow_repeat)
        hybrid = load_as_hybrid(
            config.model,
            plan,
            context=config.context,
            rope_theta=config.rope_theta,
            dtype=torch.float32,
        )
    except BaseException:
        if not resume and processes.is_first:
            shutil.rmtree(Path(config.out) if created else folder, ignore_errors=True)
        raise
    if processes.is_first:
        np.save(folder / HELDOUT, text)
    data, packing = None, {}
    if isinstance(packed, Mixture):
        packing = {"sets": packed.report(config.num_sequences)}
        say_mixture(packed, config, len(text), say)
    else:
        report = packed.report()
        say(
            f"{train.num_tokens:,} tokens to train on, {len(text):,} held out; "
            f"{report.rows:,} sequences of {config.context:,}, {report.padding_rate:.1%} padding"
        )
        data, packing = corpus.info.get("sources"), report.to_dict()
    say(
        f"layers {plan}  "
        f"{f'sparse layers see {plan.pattern}; ' if 'S' in plan.layers else ''}rotary base "
        f"{hybrid.config.rope_parameters['rope_theta']:,.0f}"
    )
    record = {
        "kind": "extend",
        "longgen": __version__,
        "versions": versions(),
        "card": card_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "processes": processes.count,
        "config": config.to_dict(),
        "rope_theta": hybrid.config.rope_parameters["rope_theta"],
        "original_context": base.max_position_embeddings,
        "data": data,
        "packing": packing,
    }
    figures = _train(config, hybrid, packed, shape, plan, checkpointing, checkpoint, processes, say)
    record["training"] = {**figures, "planned_bytes": planned}
    record["finished"] = not figures["interrupted"]
    if figures["interrupted"]:
        say(
            f"stopped and saved at step {figures['step']} of {config.steps}; resume the run in "
            f"{config.out} to go on from there"
        )
        return record
    hybrid.to(base.dtype or torch.bfloat16)
    hybrid.config.use_cache = True
    processes.first(lambda: save_hybrid(hybrid, tokenizer, Path(config.out), record), lambda: None)
    say(f"hybrid written to {config.out}")
    return record


def _silent(line: str) -> None:
    """Leave the reporting to the first process."""


def _fit(config: ExtendConfig, shape: ModelShape) -> tuple[bool, int]:
    """Choose gradient checkpointing and check memory; returns the choice and the estimated
    bytes."""

    def estimate(checkpointing: bool) -> Any:
        tokens = config.context // config.context_parallel
        return training_memory(shape, tokens, gradient_checkpointing=checkpointing)

    gpus = machine_gpus()
    checkpointing = config.gradient_checkpointing != "off"
    if config.gradient_checkpointing == "auto" and gpus is not None:
        checkpointing = not fits(estimate(False), gpus.gpu)
    memory = estimate(checkpointing)
    if gpus is not None:
        check_fits(memory, gpus, f"Training at {config.context:,} tokens", force=config.force)
    return checkpointing, memory.total


def _begin(config: ExtendConfig, resume: bool, say: Say) -> Path | None:
    """Claim the output folder, or find where a run in it stopped."""
    check_folder(config, resume)
    folder = training_folder(config.out)
    if not resume:
        write_json(folder / RUN, config.to_dict())
        return None
    checkpoint, cut_off = newest_checkpoint(folder)
    for path in cut_off:
        say(f"{path.name} was cut off while it was written; it is not used")
        shutil.rmtree(path)
    say(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting over")
    return checkpoint


def _documents(config: ExtendConfig) -> Documents:
    return read_documents(
        config.data,
        strict=config.strict,
        join_folders=config.join_folders,
        text_field=config.text_field,
    )


def _corpus(
    config: ExtendConfig, tokenizer: Any, documents: Documents | None, say: Say
) -> TokenizedCorpus:
    """Tokenize the documents; without any open the corpus of a run that is resumed."""
    folder = training_folder(config.out) / "corpus"
    if documents is None and (folder / INFO_FILE).is_file():
        corpus = TokenizedCorpus.open(folder)
        corpus.check_tokenizer(tokenizer)
        return corpus
    documents = documents or _documents(config)
    last = time.perf_counter()

    def progress(state: Any) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(f"tokenizing: {state.documents:,} documents, {state.tokens:,} tokens")

    corpus = tokenize_documents(documents, tokenizer, folder, progress=progress)
    say(f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens")
    if documents.report.skipped:
        say(f"skipped: {documents.report.skipped_text()}")
    return corpus


def _split(config: ExtendConfig, corpus: CorpusView) -> tuple[CorpusView, CorpusView]:
    """Hold out some text: by default a twentieth, between two and sixteen sequences' worth."""
    if corpus.num_tokens <= config.context:
        raise UsageError(
            f"There is too little data: {corpus.num_tokens:,} tokens do not make one sequence of "
            f"{config.context:,} and held-out text beside it. Give more."
        )
    tokens = config.heldout_tokens
    if tokens is None:
        tokens = default_heldout(corpus.num_tokens, config.context)
    return split_heldout(corpus, tokens=tokens, seed=config.seed)


def compile_elementwise(model: Any) -> None:
    """Compile what lies between the matrix products of a decoder layer: norms and the gated MLP.

    One graph serves all layers. Attention stays outside: its kernels are compiled on their own.
    """
    for layer in model.model.layers:
        layer.input_layernorm.compile()
        layer.post_attention_layernorm.compile()
        layer.mlp.compile()
    model.model.norm.compile()


def _train(
    config: ExtendConfig,
    model: Any,
    packed: PackedDataset | Mixture,
    shape: ModelShape,
    plan: LayerPlan,
    checkpointing: bool,
    checkpoint: Path | None,
    processes: Processes,
    say: Say,
) -> dict[str, Any]:
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    on_gpu = torch.cuda.is_available()
    folder = training_folder(config.out)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio},
        warmup_steps=min(config.warmup_steps, max(config.steps - 1, 0)),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        dataloader_num_workers=2 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        ddp_backend=None if on_gpu or processes.count == 1 else "gloo",
        ddp_find_unused_parameters=False if processes.count > 1 else None,
    )
    # The Trainer would wrap the model in DataParallel over all GPUs, which breaks packed sequences.
    if arguments.n_gpu > 1:
        say(f"training on 1 of {arguments.n_gpu} GPUs")
        arguments._n_gpu = 1
    arguments.gradient_accumulation_steps = config.sequences_per_step // processes.data_parallel
    card = torch.cuda.get_device_name() if on_gpu else None
    progress = Progress(shape, plan, folder, config.log_steps, card, say, processes)
    if checkpointing:
        # Transformers has renamed it; the Trainer's own setting warns in one release or the other.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        compile_elementwise(model)
    trainer = LongGenTrainer(
        model=model,
        args=arguments,
        group=processes.group,
        train_dataset=TrainingSequences(packed, config.num_sequences, processes.context_parallel),
        data_collator=default_collate,
        callbacks=[progress, *(_tensorboard(folder) if processes.is_first else [])],
    )
    trainer.progress = progress
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The GPU ran out of memory at step {trainer.state.global_step + 1} "
            f"({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use). Resume the run "
            "with gradient checkpointing on, or begin another with a shorter context."
        ) from error
    finally:
        progress.release()
    model.set_context_parallel(None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "interrupted": progress.interrupted and trainer.state.global_step < config.steps,
        "step": trainer.state.global_step,
        "tokens": trainer.state.global_step * int(config.batch_tokens or 0),
        "seconds": time.perf_counter() - began,
        "first_loss": losses[0] if losses else None,
        "last_loss": statistics.mean(losses[-10:]) if losses else None,
        "gradient_checkpointing": checkpointing,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **progress.medians(),
    }


def _tensorboard(folder: Path) -> list[Any]:
    """Return the callback that writes TensorBoard events to `folder`, if TensorBoard is
    installed."""
    from transformers.integrations import TensorBoardCallback, is_tensorboard_available

    if not is_tensorboard_available():
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]
