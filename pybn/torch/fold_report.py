"""What became of every batch norm of a network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pybn.folding.reasons import UNLOCK, Reason
from pybn.torch import memory

# Where a network is told otherwise than a graph in a file.
UNLOCK_MODULE = {
    **UNLOCK,
    Reason.TRAINING_MODE: "call model.eval() before folding",
    Reason.DROPOUT_TRAINING: "call model.eval() before folding",
    Reason.NO_LINEAR_PRODUCER: "only a convolution, a Linear or a batch norm can absorb it",
    Reason.NO_LINEAR_CONSUMER: "only a convolution or a Linear can absorb a map before it",
    Reason.GRAPH_OUTPUT: "use that value inside only",
    Reason.OTHER_CONSUMER: "give the other use a layer of its own",
    Reason.CHANNEL_AXIS: "the channels of the batch norm must be the output channels or features of the layer",
    Reason.CHANNEL_AXIS_UNPROVEN: "flatten with torch.flatten(x, 1), and move axes by constants",
    Reason.NEGATIVE_SCALE: "only positive scales pass it",
    Reason.SHIFT_STAYS: "only a scale passes it, and the shift would remain",
    Reason.PADDING: "use a padding_mode other than 'zeros', or no padding",
    Reason.PARAMETER_SHAPE: "give every parameter one value per channel",
    Reason.UNSUPPORTED_DTYPE: "use float16, bfloat16, float32 or float64",
    Reason.TYPE_MISMATCH: "give the norm and the layer the same dtype",
    Reason.SKIPPED: "leave it out of skip",
}


@dataclass(frozen=True)
class Folded:
    """A batch norm that is gone.

    Attributes
    ----------
    name, kind : str
        Its name in the network, and its class.
    direction : str
        "backward" into layers before it, "forward" into layers after it, "nowhere" if it changed nothing.
    into : tuple of str
        Names of the layers that absorbed it.
    route : tuple of str
        What the map met on the way, nearest first.
    proof : str
        "trace": a symbolic trace shows it, for all inputs. "run": the run on the example inputs shows it, for all that
        take the same path.
    rank : int or None
        How many axes the data must have, if the network does not tell; the norm's place checks it.
    """

    name: str
    kind: str
    direction: Literal["backward", "forward", "nowhere"]
    into: tuple[str, ...]
    route: tuple[str, ...]
    proof: Literal["trace", "run"]
    rank: int | None = None


@dataclass(frozen=True)
class Left:
    """A batch norm that stays, with the reason.

    Attributes
    ----------
    name, kind : str
        As in `Folded`.
    reason : Reason
        The code.
    detail : str
        What was found.
    fused : str or None
        What it does in the same pass now, such as "relu"; None if it is as it was.
    """

    name: str
    kind: str
    reason: Reason
    detail: str
    fused: str | None = None

    @property
    def sentence(self) -> str:
        """What was found, and what would unlock the fold."""
        return f"{self.detail}; {UNLOCK_MODULE[self.reason]}"


Row: TypeAlias = Folded | Left


@dataclass(frozen=True)
class FoldReport:
    """Every batch norm of a network and what became of it.

    Attributes
    ----------
    rows : tuple of Folded or Left
        One for each, in the order of ``model.named_modules()``.
    reuses_memory : bool
        Whether the process has been set to reuse memory.
    """

    rows: tuple[Row, ...]
    reuses_memory: bool = False

    @property
    def folds(self) -> tuple[Folded, ...]:
        """The batch norms that are gone."""
        return tuple(row for row in self.rows if isinstance(row, Folded))

    @property
    def left(self) -> tuple[Left, ...]:
        """The batch norms that stay."""
        return tuple(row for row in self.rows if isinstance(row, Left))

    @property
    def fused(self) -> tuple[Left, ...]:
        """Those among `left` that do more in their pass over the data than before."""
        return tuple(row for row in self.left if row.fused is not None)

    @property
    def reasons(self) -> dict[Reason, int]:
        """How many batch norms stay for which reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.left).most_common())

    def __str__(self) -> str:
        """Return a line for every batch norm, their numbers, and what was done to the process."""
        lines = [(row.name or "(the model)", _outcome(row)) for row in self.rows]
        width = max((len(name) for name, _ in lines), default=0)
        counts = f"{len(self.folds)} of {len(self.rows)} batch norms folded, {len(self.left)} left"
        if self.fused:
            counts += f", {len(self.fused)} of them fused with what follows"
        kept = [memory.KEPT] if self.reuses_memory else []
        return "\n".join([*(f"{name:<{width}}  {outcome}" for name, outcome in lines), counts, *kept])


def _outcome(row: Row) -> str:
    if isinstance(row, Left):
        fused = f"fused with {row.fused}; " if row.fused is not None else ""
        return f"left ({row.reason.value}): {fused}{row.sentence}"
    limits = [
        "" if row.proof == "trace" else "by the example inputs",
        "" if row.rank is None else f"rank {row.rank} only",
    ]
    words = "; ".join(limit for limit in limits if limit)
    into = f"{'->' if row.direction == 'forward' else '<-'} {', '.join(row.into)}" if row.into else "was an identity"
    return f"{into}{f' ({words})' if words else ''}"
