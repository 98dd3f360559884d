"""Fast generation for hybrids: paged and slotted caches, continuous batching, streaming."""

from longgen.engine.engine import Engine
from longgen.engine.request import Request, RequestOutput
from longgen.engine.sampling import SamplingParams

__all__ = ["Engine", "Request", "RequestOutput", "SamplingParams"]
