"""Context parallelism: the tokens of a sequence spread over several processes."""

from longgen.parallel.attend import ContextLayouts
from longgen.parallel.group import FULL_MODES, ContextGroup, make_mesh
from longgen.parallel.shard import check_divides, shard

__all__ = ["FULL_MODES", "ContextGroup", "ContextLayouts", "check_divides", "make_mesh", "shard"]
