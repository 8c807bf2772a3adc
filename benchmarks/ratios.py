"""Ratios of pybn to a memory copy and to torch eager, all contenders interleaved in one run.

Examples
--------
    python benchmarks/ratios.py                     # the table of the README, about a minute
    python benchmarks/ratios.py --quick             # four of the shapes, fewer rounds
    python benchmarks/ratios.py --json ratios.json  # the medians and ratios as well
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from cases import OPERATIONS, RESNET50, Shape, contenders, environment

import pybn

# The most copies that an operation with out= may take: where its slabs fit L2, and elsewhere.
COPIES = {"forward": (1.4, 2.0), "inference": (1.1, 1.1), "backward": (2.0, 3.0)}
# The least speed against torch eager, fresh outputs on both sides: geometric mean, and every shape.
SPEED = {"forward": (4.0, 1.0), "inference": (0.0, 0.95), "backward": (2.5, 1.0)}


def measure(shape: Shape, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of every contender, in rounds that run all of them in a changing order."""
    functions = contenders(shape)
    rng = np.random.default_rng(1)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    keys = list(functions)
    for function in functions.values():
        function()
    for _ in range(rounds):
        for i in rng.permutation(len(keys)):
            start = time.perf_counter()
            functions[keys[i]]()
            times[keys[i]].append(time.perf_counter() - start)
    return {key: float(np.median(values)) for key, values in times.items()}


def ratios(medians: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """For each operation: time in copies (out=, fresh, torch) and speed against torch (fresh on both sides)."""
    copy = medians["copy", "memcpy"]
    return {
        operation: {
            "out": medians[operation, "out"] / copy,
            "fresh": medians[operation, "fresh"] / copy,
            "torch": medians[operation, "torch"] / copy,
            "speed": medians[operation, "torch"] / medians[operation, "fresh"],
        }
        for operation in OPERATIONS
    }


def print_table(rows: dict[Shape, dict[str, dict[str, float]]]) -> bool:
    """The table as Markdown, and whether every target is met; a figure that misses its target is marked."""
    met = True

    def cell(value: float, ok: bool) -> str:
        nonlocal met
        met &= ok
        return f"{value:.2f}{'' if ok else ' (!)'}"

    print("\nTime in copies of the tensor, `out=` given (in parentheses: speed against torch eager, fresh outputs)\n")
    print("| C@HxW, batch 32 | training forward | inference | backward |")
    print("|---|---|---|---|")
    for shape, row in rows.items():
        cells = []
        for operation in OPERATIONS:
            limit = COPIES[operation][0 if shape.fits(operation) else 1]
            copies = cell(row[operation]["out"], row[operation]["out"] <= limit)
            speed = cell(row[operation]["speed"], row[operation]["speed"] >= SPEED[operation][1])
            cells.append(f"{copies} ({speed}x){'' if shape.fits(operation) else ' *'}")
        print(f"| {shape} | {' | '.join(cells)} |")
    means = []
    for operation in OPERATIONS:
        copies = float(np.exp(np.mean([np.log(row[operation]["out"]) for row in rows.values()])))
        speed = float(np.exp(np.mean([np.log(row[operation]["speed"]) for row in rows.values()])))
        means.append(f"{copies:.2f} ({cell(speed, speed >= SPEED[operation][0])}x)")
    print(f"| geometric mean | {' | '.join(means)} |")
    print("\n\\* what the operation reads twice exceeds this machine's L2")
    if not met:
        print("(!) misses its target; the targets are at the top of benchmarks/ratios.py")
    return met


def main() -> int:
    """Measure, print, and return 1 if a target is missed and --strict was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="rounds per shape (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=pybn.get_num_threads(), help="for pybn, torch and the copy alike"
    )
    parser.add_argument("--quick", action="store_true", help="four of the shapes, a third of the rounds")
    parser.add_argument("--json", type=Path, help="also write medians and ratios to this file")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    arguments = parser.parse_args()
    pybn.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)

    shapes = [Shape(*s) for s in (RESNET50[::2][:4] if arguments.quick else RESNET50)]
    rounds = arguments.rounds // 3 if arguments.quick else arguments.rounds
    rows, medians = {}, {}
    for i, shape in enumerate(shapes):
        print(f"[{i + 1}/{len(shapes)}] {shape}", file=sys.stderr, flush=True)
        medians[shape] = measure(shape, rounds)
        rows[shape] = ratios(medians[shape])
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    met = print_table(rows)
    if arguments.json:
        record = {
            "environment": environment(),
            "rounds": rounds,
            "shapes": {
                str(shape): {
                    "seconds": {"-".join(key): value for key, value in medians[shape].items()},
                    "ratios": rows[shape],
                }
                for shape in shapes
            },
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if met or not arguments.strict else 1


if __name__ == "__main__":
    sys.exit(main())
