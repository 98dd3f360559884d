"""Which layers stay full (`LayerPlan`), written as a string with one letter a layer:
`SSSSSSSSSSFFFFFFFFFFFFSSSSSSSSSS`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from longgen.errors import UsageError
from longgen.pattern import SparsePattern

FULL_LAYER = "full_attention"
SPARSE_LAYER = "longgen_sparse"

_FULL = SparsePattern.full()
_FORMS = (
    "middle, top, bottom, interleaved (each also with a count, as middle:12), all, none, "
    "or layers such as 10-21,30"
)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Say for every decoder layer whether it attends fully or under the sparse pattern (arXiv
    2410.01485).

    Attributes:
        layers: one letter a layer from the bottom up, "F" full and "S" sparse.
        pattern: what the sparse layers see.
    """

    layers: str
    pattern: SparsePattern

    def __post_init__(self) -> None:
        if not self.layers or set(self.layers) - {"F", "S"}:
            raise UsageError(
                f"The layer string is {self.layers!r}; write one letter a layer, F for full and S "
                "for sparse."
            )

    @classmethod
    def build(
        cls,
        num_layers: int,
        full_layers: str | Sequence[int] = "middle",
        pattern: SparsePattern | None = None,
    ) -> LayerPlan:
        """Choose the full layers of a model with `num_layers` layers.

        Args:
            num_layers: decoder layers of the model.
            full_layers: "middle" (the default: the middle ceil(N / 3) layers), "top" (nearest the
                output), "bottom", "interleaved" (evenly spaced), each with an optional count
                ("middle:12" is the paper's Llama-2-7B), "all", "none", layers as text ("10-21",
                "3,5,9-11"), a layer string ("SSFFSS") or a sequence of indices.
            pattern: the sparse layers' pattern; None is the default `SparsePattern()`.

        Raises:
            UsageError: if the choice is not understood, names a layer that does not exist, or more
                layers than there are.
        """
        pattern = pattern or SparsePattern()
        if isinstance(full_layers, str):
            if re.fullmatch("[FS]+", full_layers):
                if len(full_layers) != num_layers:
                    raise UsageError(
                        f"The layer string {full_layers} has {len(full_layers)} letters, the model "
                        f"{num_layers} layers."
                    )
                return cls(full_layers, pattern)
            indices = _parse(full_layers, num_layers)
        else:
            indices = [int(index) for index in full_layers]
        wrong = sorted({index for index in indices if not 0 <= index < num_layers})
        if wrong:
            raise UsageError(
                f"Full layers {wrong} do not exist: the model has layers 0 to {num_layers - 1}."
            )
        chosen = set(indices)
        return cls("".join("F" if i in chosen else "S" for i in range(num_layers)), pattern)

    @classmethod
    def from_layer_types(cls, layer_types: Sequence[str], pattern: SparsePattern) -> LayerPlan:
        """Rebuild the plan from a checkpoint's `layer_types`."""
        unknown = set(layer_types) - {FULL_LAYER, SPARSE_LAYER}
        if unknown:
            raise UsageError(
                f"layer_types holds {sorted(unknown)}; a LongGen model has only "
                f"{FULL_LAYER!r} and {SPARSE_LAYER!r} layers."
            )
        return cls("".join("F" if kind == FULL_LAYER else "S" for kind in layer_types), pattern)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention."""
        return tuple(i for i, kind in enumerate(self.layers) if kind == "F")

    @property
    def layer_types(self) -> list[str]:
        """The plan in transformers' notation, for a config's `layer_types`."""
        return [FULL_LAYER if kind == "F" else SPARSE_LAYER for kind in self.layers]

    @property
    def full_pattern(self) -> SparsePattern:
        """What the full layers see: full causal attention, as a pattern."""
        return _FULL

    def pattern_of(self, layer_idx: int) -> SparsePattern:
        """Return what one layer sees."""
        return _FULL if self.layers[layer_idx] == "F" else self.pattern

    def __str__(self) -> str:
        return self.layers


def _parse(text: str, num_layers: int) -> list[int]:
    """Turn a choice such as "middle:12" or "3,5,9-11" into layer indices."""
    named = re.fullmatch(r"(middle|top|bottom|interleaved)(?::(\d+))?", text)
    if named:
        name = named[1]
        count = int(named[2]) if named[2] else -(-num_layers // 3)
        if count > num_layers:
            raise UsageError(
                f"{text} asks for {count} full layers; the model has only {num_layers}."
            )
        if name == "interleaved":
            return [(2 * i + 1) * num_layers // (2 * count) for i in range(count)]
        starts = {"middle": (num_layers - count) // 2, "top": num_layers - count, "bottom": 0}
        return list(range(starts[name], starts[name] + count))
    if text in ("all", "none"):
        return list(range(num_layers)) if text == "all" else []
    indices: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not span:
            raise UsageError(
                f"The choice of full layers {text!r} is not understood; give {_FORMS}."
            )
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise UsageError(
                f"The layer range {part.strip()!r} runs backwards; write {last}-{first}."
            )
        indices += range(first, last + 1)
    return indices
