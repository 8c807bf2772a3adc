"""The README's Python blocks run as they stand, one after the other."""

import re
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "mnist_cnn.onnx", "model.onnx")
    rng = np.random.default_rng(0)
    names = {"conv_weight": rng.standard_normal((8, 4, 3, 3)), "conv_bias": rng.standard_normal(8)}
    names |= {name: rng.random(8) for name in ("running_mean", "running_var", "bn_weight", "bn_bias")}
    for block in BLOCKS:
        exec(block, names)  # the blocks build on one another
    assert names["y"].shape == names["dx"].shape == (32, 64, 56, 56)
    assert names["weight"].shape == (8, 4, 3, 3)
    assert not names["result"].report.left
    assert Path("layer.npz").exists()


def test_there_are_three_of_them():
    assert len(BLOCKS) == 3


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
