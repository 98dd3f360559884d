"""What the demo runs: the real thing on a GPU, a small version of the same path on a CPU."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.train.config import ExtendConfig

NUM_LAYERS = 30
SEED = 0

# Not the library's own text: installed packages, test data, byte code, the interpreter's build.
_NOT_TEXT = ("site-packages", "dist-packages", "test", "tests", "__pycache__", "lib-dynload")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Hold the sizes of a demo run.

    Attributes:
        context: the length that the model is extended to, in tokens.
        original_context: what the base is taken to have; below its real 8,192 on a CPU.
        pattern: what the sparse layers see.
        steps: optimizer steps.
        sequences_per_step: training sequences in a step.
        recall_records: planted records in a recall sequence; None is one per 1,000 tokens.
        lengths: of the needle grid.
        num_depths, samples: of the needle grid.
        loss_windows: held-out windows of the loss curve.
        cost_lengths: where cache and decode time are measured.
        data: what to train on.
        notes: what a reader of the report has to know.
    """

    context: int
    original_context: int
    pattern: SparsePattern
    steps: int
    sequences_per_step: int
    learning_rate: float
    recall_records: int | None
    lengths: tuple[int, ...]
    num_depths: int
    samples: int
    loss_windows: int
    cost_lengths: tuple[int, ...]
    data: tuple[str, ...]
    notes: tuple[str, ...]

    def extension(self, model: Path, out: Path, full_layers: str = "middle") -> ExtendConfig:
        """Return the extension run; twins differ from the demo in `full_layers` alone."""
        return ExtendConfig(
            model=str(model),
            out=str(out),
            context=self.context,
            data=self.data,
            join_folders=True,
            layers=LayerPlan.build(NUM_LAYERS, full_layers, self.pattern).layers,
            pattern=self.pattern.to_dict(),
            steps=self.steps,
            batch_tokens=self.sequences_per_step * self.context,
            learning_rate=self.learning_rate,
            warmup_steps=min(10, self.steps // 4),
            recall_share=0.5,
            recall_records=self.recall_records,
            recall_kinds="codes",
            allow_repeat=True,
            save_steps=50,
            gradient_checkpointing="auto" if torch.cuda.is_available() else "off",
            log_steps=10 if self.steps >= 50 else 1,
            seed=SEED,
        )


def library_text(folders: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return the paths of the Python library's sources: all its packages and modules, or some."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if folders is not None:
        return tuple(str(library / folder) for folder in folders)
    packages = sorted(
        str(path) for path in library.iterdir() if path.is_dir() and path.name not in _NOT_TEXT
    )
    return (str(library / "*.py"), *packages)


_RECALL_NOTE = (
    'Half of the training sequences had generated records ("Record amber-cedar-42 has code '
    '918273.") and lookups planted in them. Their wording is not that of the needle test, but '
    "they train the same skill: finding a number by its key at any distance."
)


def settings() -> DemoSettings:
    """Return the settings for this machine."""
    if torch.cuda.is_available():
        models = Path(transformers.__file__).parent / "models"
        return DemoSettings(
            context=32768,
            original_context=8192,
            pattern=SparsePattern(),
            steps=100,
            sequences_per_step=4,
            learning_rate=5e-4,
            recall_records=None,
            lengths=(4096, 8192, 16384, 32768),
            num_depths=11,
            samples=10,
            loss_windows=8,
            cost_lengths=(4096, 8192, 16384, 32768),
            data=(*library_text(), str(models)),
            notes=(
                _RECALL_NOTE,
                "13 million tokens is very little training, with one seed; the numbers say what "
                "can be had in minutes, not what is best.",
            ),
        )
    return DemoSettings(
        context=512,
        original_context=256,
        pattern=SparsePattern(block_size=32, sink_blocks=1, local_blocks=2),
        steps=10,
        sequences_per_step=2,
        learning_rate=2e-4,
        recall_records=6,
        lengths=(128, 256, 512),
        num_depths=10,
        samples=1,
        loss_windows=4,
        cost_lengths=(128, 256, 512),
        data=library_text(("asyncio", "email", "json", "logging")),
        notes=(
            "This is the small version for a machine without a GPU: the same path from checkpoint "
            "to report in a few minutes, but no evidence. The model can read 8,192 tokens; here it "
            "is taken to stop at 256 and is extended to 512 with a few thousand tokens. The full "
            "model therefore finds the needle already, and the hybrid has had no time to learn. "
            "Run `make demo` on a GPU for the real extension from 8,192 to 32,768 tokens.",
            _RECALL_NOTE,
        ),
    )
