"""`python -m pybn` is the `pybn` command."""

from __future__ import annotations

from pybn.cli import main

if __name__ == "__main__":
    main()
