"""From the words of the command line to a plan; what makes no sense is a `UsageError` that names the option."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pybn.bench import cases, problem, session
from pybn.bench.cases import BATCH, UsageError
from pybn.bench.peers import PEERS, SLOW_TO_START, YARDSTICKS
from pybn.bench.report import STYLES

PICTURES = (".png", ".svg", ".pdf")


def plan(
    *,
    operations: str | None,
    shapes: Sequence[str],
    batch: int | None,
    dtypes: Sequence[str],
    layouts: Sequence[str],
    peers: str | None,
    threads: int | None,
    rounds: int | None,
    quick: bool,
) -> session.Plan:
    """Return what to measure; None and empty lists are the defaults."""
    if batch is not None and batch < 1:
        raise UsageError(f"--batch is {batch}, expected at least 1")
    if rounds is not None and rounds < 1:
        raise UsageError(f"--rounds is {rounds}, expected at least 1")
    chosen_operations = [cases.OPERATIONS[name] for name in _names("--ops", operations, cases.OPERATIONS)]
    chosen_shapes = []
    for name in shapes or ["resnet50"]:
        # A comma separates lists, unless a file is called so.
        for part in [name] if Path(name).is_file() else _split(name):
            found = cases.shape_list(part, BATCH if batch is None else batch)
            chosen_shapes += cases.quick(found) if quick else found
    if not chosen_shapes:
        raise UsageError(f"--shapes is empty, expected {', '.join(cases.SHAPE_LISTS)} or a file")
    chosen_dtypes = _names("--dtype", ",".join(dtypes) or "float32", cases.ITEM_BYTES)
    for name in chosen_dtypes:
        problem.numpy_dtype(name)
    chosen_layouts = _names("--layout", ",".join(layouts) or "nchw", cases.LAYOUTS)
    return session.Plan(
        session.plan_cases(chosen_shapes, chosen_operations, chosen_dtypes, chosen_layouts),
        peer_names(peers, quick),
        session.set_threads(threads),
        rounds or (session.QUICK_ROUNDS if quick else session.ROUNDS),
    )


def peer_names(text: str | None, quick: bool) -> list[str]:
    """Return the peers of ``--peers``; by default all but yardsticks and, with ``--quick``, what compiles for long."""
    if text is None:
        left_out = YARDSTICKS + (SLOW_TO_START if quick else ())
        return [name for name in PEERS if name not in left_out]
    if text == "none":
        return []
    return _names("--peers", text, PEERS, "none")


def require_no_others(option: str, others: Mapping[str, object]) -> None:
    """Refuse options that another one leaves without a meaning."""
    clashes = [name for name, value in others.items() if value]
    if clashes:
        raise UsageError(f"{option} takes what it needs from its file; leave out {', '.join(clashes)}")


def require_consistent(
    table: str, tolerance: float | None, baseline: Path | None, as_json: Path | None, picture: Path | None
) -> None:
    """Refuse, before minutes are spent on measuring, what could not be done with the result."""
    if table not in STYLES:
        raise UsageError(f"--table is {table!r}, expected {' or '.join(STYLES)}")
    if tolerance is not None and baseline is None:
        raise UsageError("--tolerance is for --compare; give that, too, or leave it out")
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"--tolerance is {tolerance:g}, expected more than 0")
    for option, path in (("--json", as_json), ("--plot", picture)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
            raise UsageError(f"{option} {path} {what}, expected the name of a file in a folder that does exist")
    if picture is not None and picture.suffix not in PICTURES:
        raise UsageError(f"--plot {picture}: expected a name that ends in {', '.join(PICTURES)}")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib; run: pip install "pybn[bench]"')


def _names(option: str, text: str | None, known: Iterable[str], *others: str) -> list[str]:
    """Return the names of a comma list in the order given; all known ones for None and "all"."""
    known = list(known)
    if text is None or text == "all":
        return known
    names = list(dict.fromkeys(_split(text)))
    for name in names or [""]:
        if name not in known:
            raise UsageError(f"{option} {name!r} is not known, expected {', '.join([*known, 'all', *others])}")
    return names


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
