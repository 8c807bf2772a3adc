"""The Python blocks of README.md and docs/family.md run as they stand, one after the other."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import pybn

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CHANGELOG.md", "HACKING.md", "docs/family.md"]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "mnist_cnn.onnx", "model.onnx")
    names: dict[str, Any] = {}
    blocks = blocks_of("README.md")
    for block in blocks:
        exec(block, names)  # the blocks build on one another
    assert names["y"].shape == names["dx"].shape == (32, 64, 56, 56)
    assert names["conv_weight"].shape == (8, 4, 3, 3)
    assert not names["result"].report.left
    assert Path("layer.npz").exists()
    assert len(blocks) == 4


class Network:
    """What docs/family.md calls a network."""

    def __init__(self):
        self.layers = [pybn.BatchNorm1d(64), pybn.BatchNorm1d(64)]

    def __call__(self, x):
        first, second = self.layers
        return second(np.tanh(first(x)))


def test_python_blocks_about_the_family_run(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "mnist_cnn.onnx", "model.onnx")
    onnx.save(pybn.fold_onnx("model.onnx").model, "folded.onnx")
    x = rng.standard_normal((512, 64), dtype=np.float32)
    start = rng.standard_normal((16, 64), dtype=np.float32)
    names: dict[str, Any] = {
        "pybn": pybn, "np": np, "functools": functools, "x": x, "reference": x[:100], "steps": 5,
        "sequences": rng.standard_normal((16, 5, 64), dtype=np.float32), "lengths": rng.integers(1, 6, 16),
        "inputs": rng.standard_normal((16, 5, 64), dtype=np.float32), "start": start, "dstate": start,
        "recurrent": np.eye(64, dtype=np.float32), "network": Network(), "batches": [x, x[:99]],
        "module": torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8)),
        "plain_module": torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)),
        "loader": [(torch.from_numpy(x), "labels")], "client": None,
        "paths": [100, 50], "load": lambda path: [x[:path]],
        "feeds": [{"image": rng.integers(0, 256, (50, 1, 28, 28)).astype(np.uint8)}],
    }  # fmt: skip
    blocks = blocks_of("docs/family.md")
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (16, 5, 64)
    assert names["dstate"].shape == (16, 64)
    assert len(names["result"].statistics) == 8
    assert names["network"].layers[0].running_mean.any()
    assert "batch_norm" in dict(names["plain_module"][0].named_children())
    assert len(blocks) == 7


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (folder / target).is_file(), target
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-") for line in lines_of(page) if line[:3] == "## "
    }
    for target in re.findall(r"\]\(#([^)]+)\)", (ROOT / page).read_text()):
        assert target in headings, target


def lines_of(page):
    return (ROOT / page).read_text().splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_in_backticks_exist(page):
    for target in re.findall(
        r"`((?:tests|examples|benchmarks|docs|pybn|csrc)/[\w/.-]+\.\w+)`", (ROOT / page).read_text()
    ):
        assert (ROOT / target).is_file() or target.endswith(".folded.onnx"), target
