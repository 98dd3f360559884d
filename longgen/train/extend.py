"""The main job: convert a checkpoint and continue training it at the target length."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longgen import __version__
from longgen.accounting import check_fits
from longgen.checkpoint import (
    check_weights,
    load_tokenizer,
    read_config,
    refuse_hybrid,
    write_json,
)
from longgen.convert import hybrid_config, load_as_hybrid
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
from longgen.train.export import write_hybrid
from longgen.train.float8 import check_float8
from longgen.train.folder import HELDOUT, RUN, check_folder, training_folder
from longgen.train.loop import Held, hold_model, run_training
from longgen.train.processes import Processes
from longgen.train.saving import newest_checkpoint
from longgen.train.sharding import choose_sharding
from longgen.train.trainer import Say
from longgen.training_memory import choose_checkpointing, training_memory
from longgen.training_setup import TrainingSetup


def extend(config: ExtendConfig, *, resume: bool = False, say: Say = print) -> dict[str, Any]:
    """Extend a model's context: convert, train, and write the hybrid to `config.out`.

    Under torchrun every process calls this. `context_parallel` neighbours share each sequence, the
    groups of them share a step's sequences, and on GPUs all of them share the model (`sharding`).
    `config.out` must be the same folder for all.

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
    hybrid = hybrid_config(base, plan, context=config.context, rope_theta=config.rope_theta)
    check_weights(config.model)
    shape = ModelShape.from_config(base)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, base.vocab_size)
    if config.fp8:
        check_float8("cuda" if torch.cuda.is_available() else "cpu")
    held, planned = _fit(config, shape, plan, processes)
    recall = recall_text(config, tokenizer)
    mixture = mixture_of(config, tokenizer, recall)
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
            tokens = config.heldout_tokens
            tokens = 16 * config.context if tokens is None else tokens
            packed, text = mixture, mixture.heldout(tokens)
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
                recall=recall,
                recall_share=config.recall_share,
            )
        packed.check_enough(config.num_sequences, allow_repeat=config.allow_repeat)
        model = hold_model(config, hybrid, lambda: _load(config, plan), held, processes)
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
        f"{hybrid.rope_parameters['rope_theta']:,.0f}"
    )
    record = {
        "kind": "extend",
        "longgen": __version__,
        "versions": versions(),
        "card": card_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "processes": processes.count,
        "config": config.to_dict(),
        "rope_theta": hybrid.rope_parameters["rope_theta"],
        "original_context": base.max_position_embeddings,
        "data": data,
        "packing": packing,
    }
    figures = run_training(config, model, packed, shape, plan, held, checkpoint, processes, say)
    record["training"] = {**figures, "planned_bytes": planned}
    record["finished"] = not figures["interrupted"]
    if figures["interrupted"]:
        say(
            f"stopped and saved at step {figures['step']} of {config.steps}; resume the run in "
            f"{config.out} to go on from there"
        )
        return record

    def write() -> None:
        last, _ = newest_checkpoint(folder)
        assert last is not None, "the Trainer saves after the last step"
        dtype = base.dtype or torch.bfloat16
        write_hybrid(config, last, hybrid, tokenizer, dtype, config.out, record)

    processes.first(write, lambda: None)
    say(f"hybrid written to {config.out}")
    return record


def _silent(line: str) -> None:
    """Leave the reporting to the first process."""


def _load(config: ExtendConfig, plan: LayerPlan) -> Any:
    return load_as_hybrid(
        config.model,
        plan,
        context=config.context,
        rope_theta=config.rope_theta,
        dtype=torch.float32,
    )


def _fit(
    config: ExtendConfig, shape: ModelShape, plan: LayerPlan, processes: Processes
) -> tuple[Held, int]:
    """Choose how the model is held, and check memory; returns the choice and the bytes of tensors
    to be expected on each GPU."""
    gpus = machine_gpus()
    sharding = choose_sharding(config.sharding, processes.count, on_gpu=torch.cuda.is_available())
    setup = TrainingSetup(
        gpus=processes.count,
        context_parallel=processes.context_parallel,
        sharding="ddp" if sharding == "none" else sharding,
        offload=config.offload,
        compile=config.compile == "on" or (config.compile == "auto" and gpus is not None),
        is_bf16=gpus is not None,
        accumulates=config.sequences_per_step > processes.data_parallel,
    )
    setup = choose_checkpointing(
        config.gradient_checkpointing,
        shape,
        config.context,
        setup,
        plan,
        processes.least_memory(gpus),
        fp8=config.fp8,
    )
    memory = training_memory(shape, config.context, setup, plan)
    if gpus is not None:
        check_fits(memory, gpus, f"Training at {config.context:,} tokens", force=config.force)
    return Held(sharding, setup.checkpointing), memory.allocated


def _begin(config: ExtendConfig, resume: bool, say: Say) -> Path | None:
    """Claim the output folder, or find where a run in it stopped."""
    check_folder(config, resume)
    folder = training_folder(config.out)
    if not resume:
        write_json(folder / RUN, config.to_run())
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
