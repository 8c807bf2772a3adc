"""Where results live, how long, and what is kept for the backward pass."""

import ctypes
import gc
import pickle
import platform
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_python
from torch.utils.checkpoint import checkpoint

import pybn
import pybn.torch
from pybn import _core

LARGE = (4, 32, 64, 64)  # 2 MiB of float32, and a MiB of half types: recycled


def recycled():
    return _core.cache_statistics()[2]


def new_results():
    _, _, recycled, fresh = _core.cache_statistics()
    return recycled + fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_large_results_and_gradients_come_from_recycled_memory(dtype):
    layer = pybn.torch.BatchNorm2d(32, activation="relu")
    x = torch.randn(LARGE).to(dtype).requires_grad_()
    for _ in range(2):  # y and dx
        torch.autograd.grad(layer(x), x, torch.ones_like(x))
    before = recycled()
    torch.autograd.grad(layer(x), x, torch.ones_like(x))
    assert recycled() == before + 2


def test_small_results_do_not():
    before = new_results()
    pybn.torch.BatchNorm2d(32)(torch.randn(2, 32, 8, 8))
    assert new_results() == before


def test_a_result_lives_as_long_as_any_view_of_it():
    layer = pybn.torch.BatchNorm2d(32)
    x = torch.randn(LARGE)
    with torch.no_grad():
        y = layer(x)
        expected = y.clone()
        views = [y[1], y.view(-1), torch.from_numpy(y.numpy()), torch.from_dlpack(y)]
        del y
        gc.collect()
        others = [layer(torch.full(LARGE, float(i))) for i in range(4)]
        assert len({o.data_ptr() for o in others} | {views[1].data_ptr()}) == 5
    assert torch.equal(views[0], expected[1])
    for view in views[1:]:
        assert torch.equal(view.view(-1), expected.view(-1))


def test_a_result_is_aligned_and_ordinary():
    layer = pybn.torch.BatchNorm2d(32)
    for shape in (LARGE, (2, 32, 3, 3)):
        y = layer(torch.randn(shape)).detach()
        assert type(y) is torch.Tensor
        assert y.data_ptr() % 64 == 0
        assert y._version == 0
        assert not y._is_view()
        assert y.storage_offset() == 0
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        assert torch.equal(pickle.loads(pickle.dumps(y)), y)
        assert torch.equal(y.clone().share_memory_(), y)
        y += 1
        assert y._version == 1
        y.t_() if y.dim() == 2 else y.transpose_(0, 1)
        assert y.shape[0] == 32


def test_in_place_operations_on_the_result_do_not_disturb_its_gradient():
    x = torch.randn(4, 5, 3, 3).requires_grad_()
    layer = pybn.torch.BatchNorm2d(5, activation="relu")
    (expected,) = torch.autograd.grad(layer(x) * 2, x, torch.ones_like(x))
    y = layer(x)
    y.mul_(2)
    (got,) = torch.autograd.grad(y, x, torch.ones_like(x))
    torch.testing.assert_close(got, expected)


def test_changing_what_is_saved_is_an_error_as_in_torch():
    for change in ("x", "weight"):
        layer = pybn.torch.BatchNorm2d(5)
        x = torch.randn(4, 5, 3, 3)
        y = layer(x)
        with torch.no_grad():
            (x if change == "x" else layer.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_backward_pass_needs_retain_graph():
    layer = pybn.torch.BatchNorm2d(5)
    y = layer(torch.randn(4, 5, 3, 3)).sum()
    y.backward(retain_graph=True)
    first = layer.weight.grad.clone()
    y.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()


class Packed:
    """Saved-tensor hooks that note what is saved."""

    def __init__(self):
        self.sizes = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved[0] + 0)

    def pack(self, tensor):
        self.sizes.append(tensor.numel() * tensor.element_size())
        return (tensor.detach().clone(),)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_saved_are_the_input_small_vectors_and_a_bit_mask(activation, with_residual):
    layer = pybn.torch.BatchNorm2d(32, activation=activation)
    x, residual = (torch.randn(4, 32, 16, 16).requires_grad_() for _ in range(2))
    inputs = (x, residual) if with_residual else (x,)
    packed = Packed()
    with packed.hooks:
        y = layer(*inputs)
    tensor = x.numel() * 4
    mask = x.numel() // 8 if with_residual and activation in ("relu", "leaky_relu") else 0
    extra = tensor if with_residual and activation == "silu" else 0
    assert sum(packed.sizes) == tensor + mask + extra + 2 * 32 * 4
    expected = torch.autograd.grad(layer(*inputs), inputs, torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(y, inputs, torch.ones_like(x)), expected)


def test_what_is_saved_is_freed_after_the_backward_pass():
    layer = pybn.torch.BatchNorm2d(32, activation="relu")
    leaf = torch.randn(2, 32, 8, 8).requires_grad_()
    x = leaf * 1
    reference = weakref.ref(x)
    y = layer(x)
    del x
    assert reference() is not None or y.grad_fn is not None
    loss = y.sum()
    loss.backward()
    gc.collect()
    assert reference() is None
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = y.grad_fn.saved_tensors


def test_nothing_is_saved_without_gradients():
    layer = pybn.torch.BatchNorm2d(32, activation="relu")
    packed = Packed()
    with packed.hooks, torch.no_grad():
        layer(torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8))
    assert packed.sizes == []


def test_reading_is_zero_copy_and_leaves_inputs_alone():
    layer = pybn.torch.BatchNorm2d(32, activation="relu")
    x = torch.randn(LARGE).requires_grad_()
    before = x.detach().clone()
    layer(x).sum().backward()
    assert torch.equal(x.detach(), before)
    assert x._version == 0


def test_emptying_the_cache_spares_results_in_use():
    layer = pybn.torch.BatchNorm2d(32)
    x = torch.randn(LARGE)
    y = layer(x)
    expected = y.detach().clone()
    pybn.empty_cache()
    assert torch.equal(y, expected)
    del y
    gc.collect()
    assert _core.cache_statistics()[0] > 0
    pybn.empty_cache()
    assert _core.cache_statistics()[0] == 0


def test_checkpointing_drops_the_mask_too():
    layer = pybn.torch.BatchNorm2d(32, activation="relu")
    x, residual = (torch.randn(LARGE).requires_grad_() for _ in range(2))
    y = checkpoint(lambda x, r: layer(x, r) * 1, x, residual, use_reentrant=False)
    expected = torch.autograd.grad(layer(x, residual) * 1, (x, residual), torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(y, (x, residual), torch.ones_like(x)), expected)


def test_numpy_and_torch_results_have_the_same_bits():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 5, 6, 7)).astype(np.float32)
    weight, bias = rng.uniform(0.5, 2, (2, 5)).astype(np.float32)
    expected = pybn.batch_norm(x, None, None, weight, bias, True, activation="silu")
    y = pybn.torch.batch_norm(
        torch.from_numpy(x), None, None, torch.from_numpy(weight), torch.from_numpy(bias), True, activation="silu"
    )
    assert y.numpy().tobytes() == expected.tobytes()


# In a process of its own: in one that ran other tests, what they left in the heap is where results fit or do not.
KEPT_AND_GIVEN_BACK = """
from pathlib import Path
import torch
from pybn.torch import accelerate, fold, reuse_memory

def resident():  # MB
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

def after_a_result_of(megabytes):
    torch.ones(250_000 * megabytes)
    return resident()

after_a_result_of(400)  # starts the threads
empty = resident()
assert after_a_result_of(40) < empty + 20
accelerate(torch.nn.ReLU())
fold(torch.nn.ReLU())
assert after_a_result_of(40) < empty + 20
{how}
# 800 MB if none were used again; glibc's cache of small blocks can hold up to seven apart from what aligns them.
assert all(empty + 30 < after_a_result_of(40) < empty + 400 for _ in range(20))
reuse_memory(False)
assert resident() < empty + 20
assert after_a_result_of(400) < empty + 20  # that fits into none of the holes that the others have left
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    "how",
    ["reuse_memory()", "accelerate(torch.nn.ReLU(), reuse_memory=True)", "fold(torch.nn.ReLU(), reuse_memory=True)"],
)
def test_a_process_keeps_what_it_frees_if_told_to_and_gives_it_back(tmp_path, how):
    run_python(KEPT_AND_GIVEN_BACK.format(how=how), tmp_path)


@pytest.mark.parametrize("missing", ["mallopt", "malloc_trim"])
def test_a_platform_that_cannot_keep_memory_says_so(monkeypatch, missing):
    c = SimpleNamespace(mallopt=lambda *_: 1, malloc_trim=lambda *_: 1)
    delattr(c, missing)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: c)
    with pytest.raises(RuntimeError, match="has no mallopt, expected glibc"):
        pybn.torch.reuse_memory()
    model = torch.nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError, match="has no mallopt, expected glibc"):
        pybn.torch.accelerate(model, inplace=True, reuse_memory=True)
    with pytest.raises(RuntimeError, match="has no mallopt, expected glibc"):
        pybn.torch.fold(model.eval(), reuse_memory=True)
    assert type(model) is torch.nn.BatchNorm2d
