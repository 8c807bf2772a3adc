"""A small graph laid out from left to right: the neighbourhood of a batch norm that stays.

The method of Sugiyama, Tagawa and Toda (1981) in its simplest form: nodes in columns by their longest way from an
input, a place to pass in every column that an edge skips, and places ordered, and moved, towards the mean of their
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pybn.folding.report import Neighbour

BOX_WIDTH, BOX_HEIGHT = 160, 38
GAP = 44  # between columns
ROW, LANE = BOX_HEIGHT + 14, 16  # heights of a node and of an edge that passes
MARGIN = 4
SWEEPS = 4


@dataclass(frozen=True)
class Box:
    """A node and its upper left corner."""

    node: Neighbour
    x: float
    y: float


@dataclass(frozen=True)
class Edge:
    """A value on its way from one box to another: the data of an SVG path."""

    value: str
    path: str


@dataclass(frozen=True)
class Sketch:
    """A graph in a plane of the given size."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    width: float
    height: float


def sketch(nodes: Sequence[Neighbour]) -> Sketch:
    """Lay out nodes and the values between them."""
    links = _links(nodes)
    column_of = _columns(len(nodes), [(a, b) for a, b, _ in links])
    # Places are numbered: first the nodes, then one for every column that an edge passes.
    chains: list[list[int]] = []
    for a, b, _ in links:
        passed = range(column_of[a] + 1, column_of[b])
        chains.append([a, *range(len(column_of), len(column_of) + len(passed)), b])
        column_of.extend(passed)
    heights = [ROW if place < len(nodes) else LANE for place in range(len(column_of))]
    middles = _middles(column_of, heights, chains)
    boxes = tuple(
        Box(node, _left(column_of[place]), middles[place] - BOX_HEIGHT / 2) for place, node in enumerate(nodes)
    )
    edges = tuple(
        Edge(value, _path([(column_of[place], middles[place]) for place in chain]))
        for (_, _, value), chain in zip(links, chains, strict=True)
    )
    width = _left(max(column_of, default=0)) + BOX_WIDTH + MARGIN
    return Sketch(boxes, edges, width, max(middles, default=0.0) + BOX_HEIGHT / 2 + MARGIN)


def _links(nodes: Sequence[Neighbour]) -> list[tuple[int, int, str]]:
    """Return (from, to, value) for every value that one node makes and another one takes."""
    makers = {value: number for number, node in enumerate(nodes) for value in node.outputs}
    return [
        (makers[value], number, value)
        for number, node in enumerate(nodes)
        for value in dict.fromkeys(node.inputs)
        if value in makers and makers[value] != number
    ]


def _columns(count: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """Return the column of every node: right of all that it takes from, and close to what takes from it."""
    columns = [0] * count
    for _ in range(count):
        for a, b in links:
            columns[b] = min(max(columns[b], columns[a] + 1), count - 1)  # the limit ends cycles, which are invalid
    fed = {b for _, b in links}
    for node in set(range(count)) - fed:
        columns[node] = min((columns[b] - 1 for a, b in links if a == node), default=0)
    return columns


def _middles(column_of: Sequence[int], heights: Sequence[int], chains: Sequence[Sequence[int]]) -> list[float]:
    """Return the vertical middle of every place."""
    columns = [[p for p, c in enumerate(column_of) if c == column] for column in range(max(column_of, default=-1) + 1)]
    joined: list[list[int]] = [[] for _ in column_of]
    for chain in chains:
        for a, b in pairwise(chain):
            joined[a].append(b)
            joined[b].append(a)
    middles = [0.0] * len(column_of)
    for column in columns:
        _stack(column, [0.0] * len(column), heights, middles)
    for sweep in range(2 * SWEEPS):
        forth = sweep % 2 == 0
        for column in columns if forth else columns[::-1]:
            wanted = {}
            for place in column:
                near = [q for q in joined[place] if (column_of[q] < column_of[place]) == forth]
                wanted[place] = sum(middles[q] for q in near) / len(near) if near else middles[place]
            column.sort(key=lambda place: wanted[place])
            _stack(column, [wanted[place] for place in column], heights, middles)
    top = min((middles[p] - heights[p] / 2 for p in range(len(middles))), default=0.0)
    return [middle - top + MARGIN for middle in middles]


def _stack(column: Sequence[int], wanted: Sequence[float], heights: Sequence[int], middles: list[float]) -> None:
    """Put the places of a column below one another, on average where they are wanted."""
    edge = float("-inf")
    for place, middle in zip(column, wanted, strict=True):
        middles[place] = max(middle, edge + heights[place] / 2)
        edge = middles[place] + heights[place] / 2
    shift = sum(middles[place] - middle for place, middle in zip(column, wanted, strict=True)) / max(len(column), 1)
    for place in column:
        middles[place] -= shift


def _path(points: Sequence[tuple[int, float]]) -> str:
    """Return the curve from the right of the first place, through the others, to the left of the last."""
    (column, y), *others = points
    x = _left(column) + BOX_WIDTH
    path = f"M{x:g} {y:.1f}"
    for position, (column, following) in enumerate(others):
        end = _left(column)
        bend = abs(end - x) / 2
        path += f"C{x + bend:g} {y:.1f} {end - bend:g} {following:.1f} {end:g} {following:.1f}"
        x, y = end, following
        if position < len(others) - 1:
            x += BOX_WIDTH
            path += f"H{x:g}"
    return path


def _left(column: int) -> float:
    return MARGIN + column * (BOX_WIDTH + GAP)
