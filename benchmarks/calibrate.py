"""Compare plans of training with what was measured: python -m benchmarks.calibrate [FILE...].

Files are results of `longgen bench train`; by default all of benchmarks/results. Prints planned
against measured bytes and seconds, and the rates that would have been right. Exit code 1: a plan
of memory is off by more than the tolerance; 2: a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longgen.calibration import TOLERANCE, changed_rates, compare, fit_rates
from longgen.errors import UsageError
from longgen.evaluate.results import read_results, say_bytes, say_tokens

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of each file."""
    parser = argparse.ArgumentParser(description="Compare plans of training with measurements.")
    parser.add_argument("files", nargs="*", type=Path, help="results of longgen bench train")
    files = parser.parse_args(argv).files or sorted(RESULTS.glob("*_train*.json"))
    if not files:
        print("There is no benchmarks/results/*_train*.json yet; name files.")
        return 0
    code = 0
    for file in files:
        try:
            results = read_results(file)
        except UsageError as error:
            print(f"{file}: {error}")
            code = 2
            continue
        try:
            rows = results["rows"]
            assert isinstance(rows, list)
            found = compare(rows)
            print(f"{file.name}: {results['card']}")
            for one in found:
                sizes = [
                    say_bytes(x) if one.what == "bytes" else f"{x:.3g} s"
                    for x in (one.planned, one.measured)
                ]
                print(
                    f"  {one.case} {say_tokens(one.length)}: planned {sizes[0]}, measured "
                    f"{sizes[1]}: {one.ratio:.2f}{'' if one.is_close else '  OFF'}"
                )
            if any(one.what == "bytes" and not one.is_close for one in found):
                code = max(code, 1)
            for name, (before, after) in changed_rates(fit_rates(rows)).items():
                print(f"  {name}: {before:.3f} in the plan, {after:.3f} fits")
        except UsageError as error:
            print(f"  {error}")
    print(f"OFF: by more than {TOLERANCE:.0%}")
    return code


if __name__ == "__main__":
    sys.exit(main())
