"""What a peer is: someone else who does batch norm on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, Protocol

from pybn.bench.cases import Operation
from pybn.bench.problem import Contender, Problem


class AbsentError(RuntimeError):
    """The peer is not on this machine; the message says how it would get there."""


class UnsupportedError(RuntimeError):
    """The peer does not do the operation on this dtype or layout; the message says why."""


class Peer(Protocol):
    """One file of this package has one of these each; making one imports what it needs and fixes its threads.

    Attributes
    ----------
    name : str
        As in ``--peers``.
    version : str
    allocates : bool
        Whether every call makes new arrays, as pybn does without ``out=``; it is then compared with that.
    """

    name: str
    version: str
    allocates: bool

    def __init__(self, threads: int) -> None:
        """Load the peer, or raise an `AbsentError`."""

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return it ready to run, or raise an `UnsupportedError`."""


def require(module: str, package: str) -> Any:
    """Import an optional module; what is absent is told with how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise AbsentError(f"{error.name} is not installed; run: pip install {package}") from None
    except (ImportError, OSError) as error:
        raise AbsentError(f"{module} cannot be loaded: {str(error).splitlines()[0]}") from None


def version(package: str) -> str:
    """Version of an installed distribution."""
    return importlib.metadata.version(package)
