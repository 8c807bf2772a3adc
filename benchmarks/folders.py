"""pybn and other tools that fold batch norms, on a zoo of networks: what each leaves, and whether it is right.

    pip install -e ".[folders]"
    python benchmarks/folders.py                # the table of docs/folders.md: about half an hour
    python benchmarks/folders.py --quick        # the same networks with few channels on small images, checked by pybn
    python benchmarks/folders.py --speed        # seconds and memory for ResNet-50

Every tool folds every model in a process of its own, with a limit on time: a tool that crashes, hangs or
writes an invalid model has that in its cell. `zoo.leftovers` defines what is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from memory import memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import FULL, SMALL
from zoo.leftovers import leftovers
from zoo.packaged import inputs, packaged
from zoo.running import run

# Beyond this error, relative to the largest output, a model computes something else: it is not merely rounded.
WRONG = 1e-3
SPEED_MODEL = "ResNet-50"
SPEED_ROUNDS = 5


# The tools: each takes the path of a model and returns the folded one. Imports are theirs alone.


def fold_pybn(path: Path) -> onnx.ModelProto:
    from pybn.folding import fold_onnx

    return fold_onnx(path).model


def fold_pybn_aggressive(path: Path) -> onnx.ModelProto:
    from pybn.folding import fold_onnx

    return fold_onnx(path, aggressive=True).model


def fold_onnxsim(path: Path) -> onnx.ModelProto:
    import onnxsim

    model, _ = onnxsim.simplify(str(path))
    return model


def fold_onnxoptimizer(path: Path) -> onnx.ModelProto:
    import onnxoptimizer

    # Its default passes, which are all that fuse or eliminate, until nothing changes any more.
    return onnxoptimizer.optimize(onnx.load(path), onnxoptimizer.get_fuse_and_elimination_passes(), fixed_point=True)


def fold_onnxslim(path: Path) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(str(path))


def fold_onnxscript(path: Path) -> onnx.ModelProto:
    import onnxscript.optimizer
    import onnxscript.rewriter

    # The rewriter's default rules have those for batch norms among them.
    return onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(onnx.load(path)))


def fold_onnxruntime(path: Path) -> onnx.ModelProto:
    import onnxruntime as ort

    options = ort.SessionOptions()
    # The level above this one changes memory layouts, and turns batch norms that are left into convolutions.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    # Constants that IR version 3 lists among the inputs stay there when it has evaluated them away.
    original = {info.name for info in onnx.load(path).graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    inputs = [info for info in model.graph.input if info.name in used or info.name not in original]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


@dataclass(frozen=True)
class Tool:
    """A tool: what it is called in tables, the package it comes with, and how it folds."""

    title: str
    package: str
    fold: Callable[[Path], onnx.ModelProto]


TOOLS = {
    "pybn": Tool("pybn", "pybn", fold_pybn),
    "pybn-aggressive": Tool("pybn --aggressive", "pybn", fold_pybn_aggressive),
    "onnxsim": Tool("onnxsim", "onnxsim", fold_onnxsim),
    "onnxoptimizer": Tool("onnxoptimizer", "onnxoptimizer", fold_onnxoptimizer),
    "onnxslim": Tool("OnnxSlim", "onnxslim", fold_onnxslim),
    "onnxscript": Tool("onnxscript", "onnxscript", fold_onnxscript),
    "onnxruntime": Tool("onnxruntime", "onnxruntime", fold_onnxruntime),
}


# What a child process does: fold, count, run, and print one line of JSON.


@dataclass(frozen=True)
class Outcome:
    """What one tool has made of one model.

    Attributes
    ----------
    status : str
        "ok"; "crash" or "time" if it gave no model; "invalid" if it gave one that cannot be run.
    batch_norms, affines : int or None
        What is left.
    error : float or None
        The largest difference of an output, relative to the largest value of that output.
    bound : float or None
        For pybn, the bound that its own check derived for that, relative to the same.
    passed : bool or None
        For pybn, whether its own check passed.
    seconds : float or None
        Of the fold alone.
    detail : str
        What happened, if it was not as it should be.
    """

    status: str
    batch_norms: int | None = None
    affines: int | None = None
    error: float | None = None
    bound: float | None = None
    passed: bool | None = None
    seconds: float | None = None
    detail: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the model computes something else than the original."""
        return self.status == "ok" and (self.error is None or not self.error <= WRONG)

    def __str__(self) -> str:
        if self.status != "ok":
            return self.status
        wrong = "WRONG " if self.wrong else "fails its check " if self.passed is False else ""
        error = f"{self.error:.0e}" if self.error else "0"
        return f"{self.batch_norms}/{self.affines} ({wrong}{error})"


def judge(tool: str, path: Path, name: str, *, check: bool) -> Outcome:
    """Fold a model and compare the result with it; `check` is for pybn."""
    original = onnx.load(path)
    fed = inputs(name, original)
    start = time.perf_counter()
    try:
        folded = TOOLS[tool].fold(path)
    except Exception as error:
        return Outcome("crash", detail=f"{type(error).__name__}: {first_line(error)}")
    seconds = time.perf_counter() - start
    left = leftovers(folded, original.ir_version)
    try:
        expected, actual = run(original, fed), run(folded, fed)
    except Exception as error:
        return Outcome("invalid", left.batch_norms, left.affines, seconds=seconds, detail=first_line(error))
    error = max(map(relative_error, actual, expected))
    bound, passed, detail = None, None, ""
    if check and TOOLS[tool].package == "pybn":
        try:
            bound, passed = own_check(original, tool, fed, expected)
        except Exception as problem:
            passed, detail = False, f"its check: {type(problem).__name__}: {first_line(problem)}"
    return Outcome("ok", left.batch_norms, left.affines, error, bound, passed, seconds, detail)


def own_check(
    original: onnx.ModelProto, tool: str, fed: dict[str, Any], expected: list[Any]
) -> tuple[float | None, bool]:
    """Have pybn's own check judge its fold; the bound is that of the output with the largest."""
    from pybn.folding import fold_onnx
    from pybn.folding.verify import verify

    result = fold_onnx(original, aggressive=True) if tool == "pybn-aggressive" else fold_onnx(original)
    check = verify(original, result.model, result.report, [fed])
    scales = [float(np.abs(array).max(initial=0.0)) or 1.0 for array in expected]
    bounds = [output.bound / scale for output, scale in zip(check.outputs, scales, strict=True) if output.bound]
    return max(bounds, default=None), check.passed


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference relative to the largest expected value; infinity for another shape or NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    scale = np.abs(expected.astype(np.float64)).max(initial=0.0)
    return float(np.nan_to_num(difference / scale if scale else difference, nan=np.inf))


def first_line(error: BaseException | str) -> str:
    """Return the first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]


@dataclass(frozen=True)
class Speed:
    """Seconds from file to model in memory, and the memory that took beyond what importing the tool had taken.

    `processor` is the time of all threads: on a busy machine the steadier figure.
    """

    seconds: float
    processor: float
    bytes: int


def measure(tool: str, path: Path) -> Speed:
    """Fold a file once, after a small model has made the tool import all that it needs."""
    small = path.parent / "small.onnx"
    onnx.save(SMALL[SPEED_MODEL](), small)
    TOOLS[tool].fold(small)
    before = memory("VmHWM")
    start, processor = time.perf_counter(), time.process_time()
    folded = TOOLS[tool].fold(path)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    assert folded.graph.node
    return Speed(seconds, processor, memory("VmHWM") - before)


# What the parent does: build the models, start the children, print the tables.


def ask(what: str, name: str, path: Path, option: Any, *, limit: float) -> dict[str, Any] | Outcome:
    """Have a child process do something, see `serve`; return its answer, or what became of it."""
    command = [sys.executable, __file__, "--child", what, name, str(path), json.dumps(option)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Outcome("time", detail=f"more than {limit:.0f} s")
    if done.returncode:
        return Outcome("crash", detail=f"exit code {done.returncode}; {done.stderr.strip()[-200:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(
    names: Sequence[str], tools: Sequence[str], limit: float, *, quick: bool, check: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fold every model by every tool; yield each model's name and row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for number, name in enumerate(names, 1):
            original = ask("build", name, path, quick, limit=limit)
            if isinstance(original, Outcome):
                raise SystemExit(f"{name} cannot be built: {original.detail}")
            row: dict[str, Any] = {"bytes": path.stat().st_size, "original": original, "tools": {}}
            for tool in tools:
                progress(f"[{number}/{len(names)}] {name}: {tool}")
                found = ask("judge", tool, path, {"name": name, "check": check}, limit=limit)
                outcome = found if isinstance(found, Outcome) else Outcome(**found)
                row["tools"][tool] = asdict(outcome)
                progress(f"[{number}/{len(names)}] {name}: {tool}: {outcome} {outcome.detail}", end="\n")
            yield name, row


def compare_speed(tools: Sequence[str], limit: float) -> dict[str, Any]:
    """Time every tool on one model, in turns; the median of the seconds and of the memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ask("build", SPEED_MODEL, path, False, limit=limit)
        size = path.stat().st_size
        found: dict[str, list[Speed]] = {tool: [] for tool in tools}
        for turn in range(SPEED_ROUNDS):
            for tool in tools:
                progress(f"[{turn + 1}/{SPEED_ROUNDS}] {tool}")
                result = ask("speed", tool, path, None, limit=limit)
                if not isinstance(result, Outcome):
                    found[tool].append(Speed(**result))
    return {
        "bytes": size,
        "tools": {
            tool: {
                "seconds": float(np.median([speed.seconds for speed in speeds])),
                "processor": float(np.median([speed.processor for speed in speeds])),
                "peak": float(np.median([speed.bytes for speed in speeds])) / size,
            }
            for tool, speeds in found.items()
            if speeds
        },
    }


def progress(text: str, end: str = "") -> None:
    """Tell people what is going on: on one line of a terminal, line by line in a log."""
    terminal = sys.stderr.isatty()
    print(f"\r\x1b[K{text}" if terminal else text, end=end if terminal else "\n", file=sys.stderr, flush=True)


def comparison_table(rows: dict[str, Any], tools: Sequence[str]) -> list[list[str]]:
    """Return the cells of the table, models down and tools across."""
    table = [["", "there", *(TOOLS[tool].title for tool in tools)]]
    for name, row in rows.items():
        there = f"{row['original']['batch_norms']}/{row['original']['affines']}"
        table.append([name, there, *(str(Outcome(**row["tools"][tool])) for tool in tools)])
    return table


def speed_table(found: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table of speeds."""
    table = [["", "seconds", "of processor time", "peak memory / size of the model"]]
    for tool, speed in found["tools"].items():
        figures = f"{speed['seconds']:.2f}", f"{speed['processor']:.2f}", f"{speed['peak']:.1f}"
        table.append([TOOLS[tool].title, *figures])
    return table


def formatted(table: list[list[str]], *, markdown: bool) -> str:
    """Lay out a table for a terminal or as Markdown."""
    if markdown:
        head, *body = ("| " + " | ".join(row) + " |" for row in table)
        return "\n".join([head, "|" + "---|" * len(table[0]), *body])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def versions(tools: Iterable[str]) -> dict[str, str]:
    """Return the version of every tool's package, leaving out what is not installed."""
    found = {}
    for tool in tools:
        with contextlib.suppress(PackageNotFoundError):
            found[TOOLS[tool].package] = version(TOOLS[tool].package)
    return found


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return `new`, and what `old` has besides, at every depth."""
    both = {**old, **new}
    for key in old.keys() & new.keys():
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            both[key] = merged(old[key], new[key])
    return both


def save(found: dict[str, Any], path: Path | None) -> None:
    """Write what was found so far."""
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")


def chosen(names: str | None, there: Iterable[str], what: str) -> list[str]:
    """Return those of the names that are asked for, all by default; part of a name is enough."""
    everything = list(there)
    if names is None:
        return everything
    picked = []
    for name in names.split(","):
        exact = [candidate for candidate in everything if candidate.lower() == name.strip().lower()]
        found = exact or [candidate for candidate in everything if name.strip().lower() in candidate.lower()]
        if not found:
            raise SystemExit(f"{what}: no {name.strip()!r}, expected some of: {', '.join(everything)}")
        picked += found
    return [candidate for candidate in everything if candidate in picked]


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--child"]:
        what, name, path, option = sys.argv[2:]
        return serve(what, name, Path(path), json.loads(option))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names or parts of names, separated by commas")
    parser.add_argument("--tools", help=f"some of {','.join(TOOLS)}")
    parser.add_argument("--quick", action="store_true", help="few channels on small images, and no packaged models")
    parser.add_argument("--check", action="store_true", help="have pybn check its folds; minutes for large networks")
    parser.add_argument("--speed", action="store_true", help=f"seconds and memory for {SPEED_MODEL} instead")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one tool on one model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there, too")
    parser.add_argument("--keep", action="store_true", help="what --json's file has of other models and tools stays")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="print that again, running nothing")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args()

    tools = chosen(options.tools, TOOLS, "--tools")
    if options.source:
        found = json.loads(options.source.read_text())
    else:
        installed = versions(tools)
        tools = [tool for tool in tools if TOOLS[tool].package in installed or TOOLS[tool].package == "pybn"]
        found = {"versions": installed}
        if options.json and options.keep and options.json.exists():
            found = merged(json.loads(options.json.read_text()), found)
        if options.speed:
            found["speed"] = merged(found.get("speed", {}), compare_speed(tools, options.limit))
            save(found, options.json)
        else:
            names = chosen(options.models, SMALL if options.quick else {**FULL, **packaged()}, "--models")
            rows = found.setdefault("models", {})
            check = options.check or options.quick
            for name, row in compare(names, tools, options.limit, quick=options.quick, check=check):
                rows[name] = merged(rows.get(name, {}), row)
                save(found, options.json)
    print(", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    if "models" in found:
        there = [tool for tool in TOOLS if all(tool in row["tools"] for row in found["models"].values())]
        print(formatted(comparison_table(found["models"], there), markdown=options.markdown))
    if "speed" in found:
        print(formatted(speed_table(found["speed"]), markdown=options.markdown))
    return None


def serve(what: str, name: str, path: Path, option: Any) -> None:
    """Do what the parent asks of a child. Tools print what they like; the last line is the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        if what == "build":
            model = (SMALL if option else {**FULL, **packaged()})[name]()
            onnx.save(model, path)
            answer: Any = leftovers(model)
        else:
            answer = (
                judge(name, path, option["name"], check=option["check"]) if what == "judge" else measure(name, path)
            )
    print(json.dumps(asdict(answer)))


if __name__ == "__main__":
    main()
