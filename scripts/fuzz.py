"""Read thousands of spoilt inputs, and tell which readers do anything but accept them or refuse them in a sentence.

    python scripts/fuzz.py                       10,000 inputs over all readers (minutes)
    python scripts/fuzz.py 500 --only picture    some, of the readers whose name begins so
    python scripts/fuzz.py --case 4711           one of them, with its traceback; the spoilt file is kept

Exits with 1 if any input left a traceback, took longer than ten seconds, or more than two gigabytes. The same seed and
number make the same input. Cases run in processes of their own, whose memory is limited.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child that computes would wait for threads that it has not

from fuzzing.workers import BAD, KINDS, judged_cases, prepared, spoil


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name begins so")
    parser.add_argument("--case", type=int, help="repeat one case, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        inputs = prepared(Path(folder), options.only)
        if options.case is not None:
            target = spoil(inputs, options.seed, options.case)
            kept = Path(f"fuzzed-{options.case}{target.path.suffix}")
            kept.write_bytes(target.path.read_bytes())
            print(f"{target.name}: {kept}", file=sys.stderr)
            target.read(target.path)
            return 0
        tally: dict[str, Counter[str]] = {target.name: Counter() for target in inputs}
        distinct: dict[tuple[str, str, str], list[int]] = {}
        for done, (case, name, kind, told) in enumerate(judged_cases(inputs, options.seed, options.count), start=1):
            tally[name][kind] += 1
            if kind in BAD:
                distinct.setdefault((name, kind, told), []).append(case)
            if done % 500 == 0:
                print(f"{done} of {options.count}", file=sys.stderr, flush=True)
    width = max(map(len, tally))
    print(f"{'reader':<{width}}", *(f"{kind:>9}" for kind in KINDS))
    for name, counts in tally.items():
        print(f"{name:<{width}}", *(f"{counts[kind]:>9}" for kind in KINDS))
    total = sum(tally.values(), Counter())
    print(f"{'all':<{width}}", *(f"{total[kind]:>9}" for kind in KINDS))
    for (name, kind, told), cases in sorted(distinct.items(), key=lambda each: -len(each[1])):
        print(f"\n{len(cases)} x {name}, {kind} (--seed {options.seed} --case {cases[0]})\n  {told}")
    return int(any(total[kind] for kind in BAD))


if __name__ == "__main__":
    sys.exit(main())
