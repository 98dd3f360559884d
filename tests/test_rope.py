"""The rule for the rotary base of a longer context."""

from types import SimpleNamespace
from typing import Any

import pytest

from longgen.errors import UsageError
from longgen.rope import MARGIN, rope_theta_for, rope_theta_of


@pytest.mark.parametrize(
    ("theta", "original", "context", "head_dim", "raised"),
    [
        # By hand: 1e5 * 4 ** (64 / 62) * 8 = 3.346e6 and 1e4 * 32 ** (128 / 126) * 8 = 2.705e6.
        (1e5, 8192, 32768, 64, 3.3e6),
        (1e4, 4096, 131072, 128, 2.7e6),
        (5e5, 8192, 131072, 128, 6.7e7),
    ],
)
def test_the_base_follows_the_rule(
    theta: float, original: int, context: int, head_dim: int, raised: float
) -> None:
    assert rope_theta_for(theta, original, context, head_dim) == raised


@pytest.mark.parametrize("context", [1, 4096, 8192])
def test_a_context_within_the_original_keeps_its_base(context: int) -> None:
    assert rope_theta_for(12345.0, 8192, context, 64) == 12345.0


def test_the_slowest_rotation_reaches_as_far_as_before_with_a_margin() -> None:
    # Radians that the slowest pair of a head has turned at the end of the context.
    def turned(theta: float, tokens: int, head_dim: int) -> float:
        return tokens * theta ** (2 / head_dim - 1)

    raised = rope_theta_for(1e4, 4096, 65536, 128)
    ratio = turned(raised / MARGIN, 65536, 128) / turned(1e4, 4096, 128)
    # Two figures are kept: an error of at most half a unit in the second, 5 %.
    assert ratio == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_the_base_is_read_from_the_config(kind: str) -> None:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 500000}
    assert rope_theta_of(SimpleNamespace(rope_parameters=parameters)) == 500000.0


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_rotations_stretched_in_another_way_are_refused(kind: str) -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": kind, "rope_theta": 1e4})
    with pytest.raises(UsageError, match=f"'{kind}'.*default, llama3"):
        rope_theta_of(config)
