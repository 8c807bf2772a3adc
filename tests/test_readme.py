"""The README's Python blocks run as they stand, one after the other."""

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "mnist_cnn.onnx", "model.onnx")
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)  # the blocks build on one another
    assert names["y"].shape == names["dx"].shape == (32, 64, 56, 56)
    assert names["conv_weight"].shape == (8, 4, 3, 3)
    assert not names["result"].report.left
    assert Path("layer.npz").exists()


def test_there_are_four_of_them():
    assert len(BLOCKS) == 4


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
