"""LongGen: turn a pretrained short-context LLM into a long-context hybrid (arXiv 2410.01485).

Importing the package registers the hybrid model types with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads them.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command line answers `--help` and bad input before it loads torch; each command imports what
# it needs.
_is_command = Path((sys.argv or [""])[0]).stem == "longgen" or sys.orig_argv[1:3] == [
    "-m",
    "longgen",
]

if not _is_command:
    from longgen.checkpoint import load_model
    from longgen.convert import convert
    from longgen.errors import UsageError
    from longgen.hf import HybridCache
    from longgen.pattern import SparsePattern
    from longgen.plan import LayerPlan

    __all__ = ["HybridCache", "LayerPlan", "SparsePattern", "UsageError", "convert", "load_model"]
