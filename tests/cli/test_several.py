"""Options that take several values in a row."""

import pytest

from longgen.cli.several import repeat_options


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("m --data a --out o", "m --data a --out o"),
        ("m --data a b c --out o", "m --data a --data b --data c --out o"),
        ("m --data a b --data c", "m --data a --data b --data c"),
        ("--out o --data a b", "--out o --data a --data b"),
        ("--data a b --steps 3 m", "--data a --data b --steps 3 m"),
        ("--data=a b", "--data=a b"),
        ("--data a -- b", "--data a -- b"),
        ("--data --out o", "--data --out o"),
        ("m n", "m n"),
    ],
)
def test_an_option_takes_all_values_up_to_the_next_option(written: str, meant: str) -> None:
    assert repeat_options(written.split(), {"--data", "--text"}) == meant.split()
