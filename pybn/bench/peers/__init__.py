"""The peers, by name. Each is loaded only if it is asked for: some take seconds to import."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from pybn.bench.peers.base import AbsentError, Peer, UnsupportedError

# Name -> module and class.
PEERS = {
    "numpy": ("numpy", "NumPy"),
    "torch": ("torch", "Torch"),
    "compile": ("compile", "TorchCompile"),
    "onednn": ("onednn", "OneDNN"),
    "onnxruntime": ("onnxruntime", "OnnxRuntime"),
    "openvino": ("openvino", "OpenVINO"),
    "jax": ("jax", "Jax"),
    "bare": ("bare", "Bare"),
}
TITLES = {
    "numpy": "NumPy",
    "torch": "torch eager",
    "compile": "torch.compile",
    "onednn": "oneDNN",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "jax": "JAX jitted",
    "bare": "bare loops",
}
# With --quick, left out unless named: every operation and shape costs it seconds of compilation.
SLOW_TO_START = ("compile",)
# Nobody's library: pybn promises nothing against them, and they are left out unless named.
YARDSTICKS = ("bare",)


def find(names: Iterable[str], threads: int) -> tuple[list[Peer], dict[str, str]]:
    """Load peers by name; return those that are here, and for the others why they are not."""
    found: list[Peer] = []
    absent: dict[str, str] = {}
    for name in names:
        module, cls = PEERS[name]
        try:
            found.append(getattr(importlib.import_module(f"pybn.bench.peers.{module}"), cls)(threads))
        except AbsentError as error:
            absent[name] = str(error)
    return found, absent


__all__ = ["PEERS", "SLOW_TO_START", "TITLES", "YARDSTICKS", "AbsentError", "Peer", "UnsupportedError", "find"]
