"""Small work, and budgets of milliseconds."""

import pytest
import torch

from longgen.bench import checks
from longgen.bench.settings import Settings
from longgen.bench.timing import Budget
from longgen.bench.work import Heads, Work
from tests.bench.fakes import SMALL, provider, right

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on 128 tokens instead of 2,048."""
    monkeypatch.setattr(checks, "_SHORTEST", 128)


@pytest.fixture
def work() -> Work:
    shape = Heads(heads=4, kv_heads=2, head_dim=16)
    return Work(name="small", pattern=SMALL, length=192, shape=shape, dtype=torch.float32)


@pytest.fixture
def settings() -> Settings:
    return Settings(
        patterns={"small": SMALL},
        lengths=(192,),
        providers=(provider("good", right),),
        shape=Heads(heads=2, kv_heads=1, head_dim=16),
        device=CPU,
        dtype="fp32",
        budget=Budget(warmup_ms=0.0, repeat_ms=1.0, least=4, rounds=2),
        matmul_size=64,
        copy_bytes=1 << 12,
    )
