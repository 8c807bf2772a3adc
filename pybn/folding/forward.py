"""One function per operator: how a map that comes before it passes forward through it."""

from __future__ import annotations

from pybn.folding.steps import Rule

FORWARD: dict[str, Rule] = {}
