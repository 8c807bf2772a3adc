"""Real data, small networks: two models to work with, and what batch norm does, one claim a file.

Run all of it in a clone of the repository, after `pip install ".[examples]"`:

    python -m examples.train_mnist_cnn      # the model that README and tests fold
    python -m examples.train_accelerated    # the same network trained by stock torch and accelerated
    python -m examples.all                  # every claim: docs/what-batch-norm-does.md

Reading order: data, networks, training (plain gradient descent), experiment (runs over seeds and settings, the command
line, results), figures (how they look); then any claim: a job, `run` and `plot`.
"""

import sys
from pathlib import Path

# `python -m` looks for pybn in the clone first, where it has no compiled core; an installed one goes before that.
_clone = str(Path(__file__).resolve().parents[1])
if _clone in sys.path:
    sys.path.remove(_clone)
    sys.path.append(_clone)
