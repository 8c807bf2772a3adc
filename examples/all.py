"""Every claim people make for batch norm, one after the other: all figures, and all numbers in results.json.

In full 12 minutes on two cores; docs/what-batch-norm-does.md is about what comes out.
"""

from __future__ import annotations

import importlib
import time

from examples.experiment import parse_arguments, perform

CLAIMS = (
    "convergence",
    "learning_rates",
    "initialization",
    "smoothness",
    "regularization",
    "small_batches",
    "placement",
    "per_channel",
    "raw_inputs",
    "recurrent",
    "batch_mates",
    "conv_bias",
    "inference_statistics",
    "insertion",
    "inference_time",
)


def main() -> None:
    """Run them all; what is finished is on disk if one of them fails."""
    quick, seeds, folder = parse_arguments("python -m examples.all", __doc__)
    start = time.perf_counter()
    for name in CLAIMS:
        claim = importlib.import_module(f"examples.{name}")
        perform(name, claim.run, claim.plot, quick=quick, seeds=seeds, folder=folder)
    print(f"{len(CLAIMS)} claims in {(time.perf_counter() - start) / 60:.1f} minutes, in {folder}")


if __name__ == "__main__":
    main()
