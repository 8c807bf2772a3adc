"""The family in torch: what the NumPy layers compute, with autograd; gradcheck; freezing."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import BFLOAT16, assert_close, images
from torch import nn

import pybn
import pybn.torch as bt

DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.bfloat16: BFLOAT16}
MEMBERS = {
    "ghost": (bt.GhostBatchNorm, pybn.GhostBatchNorm, {"ghost_size": 3}),
    "renorm": (bt.BatchRenorm, pybn.BatchRenorm, {"rmax": 1.1, "dmax": 0.2}),
    "virtual": (bt.VirtualBatchNorm, pybn.VirtualBatchNorm, {}),
    "sequence": (bt.SequenceBatchNorm, pybn.SequenceBatchNorm, {"max_steps": 6}),
}


def tensor(array):
    """A tensor of the same values; NumPy's bfloat16 goes by way of float32."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


def array(t):
    return t.detach().double().numpy()


def pair(name, rng, dtype=np.float32, **options):
    """A torch module and a NumPy layer in the same state."""
    ours, layer, more = MEMBERS[name]
    module, twin = ours(4, **more, **options), layer(4, **more, **options)
    state = twin.state_dict()
    state["weight"], state["bias"] = rng.uniform(0.5, 2, 4), rng.uniform(-1, 1, 4)
    for key in state:
        if key in ("running_mean", "running_var"):
            state[key] = rng.uniform(0.5, 2, state[key].shape)
    twin.load_state_dict(state)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in twin.state_dict().items()})
    if name == "virtual":
        reference = images(rng, (6, 4, 6), dtype)
        assert_close(array(module.reference_forward(tensor(reference))), twin.reference_forward(reference), dtype)
    return module, twin


@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu6", True), ("silu", True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module_computes_what_the_numpy_layer_does(rng, dtype, name, training, activation, with_residual):
    kind = DTYPES[dtype]
    module, twin = pair(name, rng, kind, activation=activation)
    module.train(training)
    twin.train(training)
    x, residual, dy = (images(rng, (8, 4, 6), kind) for _ in range(3))
    inputs = [tensor(x).requires_grad_()] + ([tensor(residual).requires_grad_()] if with_residual else [])
    y = module(*inputs)
    assert y.dtype == dtype
    expected = twin(x, residual=residual if with_residual else None)
    assert_close(array(y), expected, kind, roundings=2)
    y.backward(tensor(dy))
    gradients = twin.backward(dy)
    for ours, theirs in zip(inputs, gradients if with_residual else [gradients], strict=True):
        assert_close(array(ours.grad) / 20, np.asarray(theirs, np.float64) / 20, kind, roundings=2)
    for ours, theirs in ((module.weight, twin.weight_grad), (module.bias, twin.bias_grad)):
        assert_close(array(ours.grad) / 100, theirs.astype(np.float64) / 100, np.float32)
    for key, value in twin.state_dict().items():
        assert_close(array(module.state_dict()[key]), value, np.float32, key)


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_pass_gradcheck(rng, name):
    module, _ = pair(name, rng, np.float64, activation="silu")
    module = module.double()
    if name == "renorm":
        module.rmax, module.dmax = 1, 0  # with r and d as constants they are not the numerical ones otherwise
    if name in ("ghost", "renorm"):
        module.momentum = 0.0  # so that all evaluations are of one function
    x, residual = (torch.from_numpy(images(rng, (4, 4, 3), np.float64)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(module, (x, residual))
    assert torch.autograd.gradgradcheck(module, (x, residual))


def test_virtual_gradients_go_through_the_reference_batch(rng):
    module = bt.VirtualBatchNorm(3, activation="silu", dtype=torch.float64)
    twin = pybn.VirtualBatchNorm(3, activation="silu", dtype=np.float64)
    reference, x, dy = (
        images(rng, (6, 3, 4), np.float64),
        images(rng, (5, 3, 2), np.float64),
        rng.standard_normal((5, 3, 2)),
    )
    leaf = torch.from_numpy(reference).requires_grad_()
    own = module.reference_forward(leaf)
    ((module(torch.from_numpy(x)) * torch.from_numpy(dy)).sum() + own.sum()).backward()
    twin.reference_forward(reference)
    twin(x)
    twin.backward(dy)
    np.testing.assert_allclose(leaf.grad, twin.reference_backward(np.ones_like(reference)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(module.weight.grad, twin.weight_grad, rtol=1e-9, atol=1e-9)

    def both(reference, x):
        own = module.reference_forward(reference)
        return own, module(x)

    assert torch.autograd.gradcheck(both, (leaf, torch.from_numpy(x).requires_grad_()))
    assert torch.autograd.gradgradcheck(both, (leaf, torch.from_numpy(x).requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 14, 14), (9, 1, 33)], ids=str)
def test_a_virtual_output_does_not_depend_on_batch_mates_bit_by_bit(rng, dtype, shape):
    module = bt.VirtualBatchNorm(shape[1], activation="silu")
    with torch.no_grad():
        module.reference_forward(torch.from_numpy(images(rng, shape)).to(dtype))
        x = torch.from_numpy(images(rng, shape)).to(dtype)
        whole = module(x)
        for index in (0, 8):
            assert torch.equal(module(x[index : index + 1])[0], whole[index])
            mates = torch.from_numpy(images(rng, (4, *shape[1:]))).to(dtype)
            assert torch.equal(module(torch.cat([mates, x[index : index + 1], mates]))[4], whole[index])


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("lengths", [[6, 5, 5, 2], [1, 6, 3, 5]], ids=str)
def test_sequences_of_unequal_lengths_and_steps(rng, lengths, channel_axis):
    module = bt.SequenceBatchNorm(4, 6, channel_axis=channel_axis, activation="silu")
    twin = pybn.SequenceBatchNorm(4, 6, channel_axis=channel_axis, activation="silu")
    shape = (4, 4, 6) if channel_axis == 1 else (4, 6, 4)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    leaf = torch.from_numpy(x).requires_grad_()
    y = module(leaf, lengths=lengths)
    assert_close(array(y), twin(x, lengths=lengths), np.float32)
    y.backward(torch.from_numpy(dy))
    assert_close(array(leaf.grad), twin.backward(dy), np.float32)
    for key, value in twin.state_dict().items():
        assert_close(array(module.state_dict()[key]), value, np.float32, key)
    module.eval()
    whole = module(leaf)
    for step in range(6):
        at = leaf[:, :, step] if channel_axis == 1 else leaf[:, step]
        of_whole = whole[:, :, step] if channel_axis == 1 else whole[:, step]
        torch.testing.assert_close(module(at, step=step), of_whole)


@pytest.mark.parametrize("suffix", [None, ".npz", ".safetensors"])
@pytest.mark.parametrize("name", MEMBERS)
def test_state_dicts_go_both_ways(rng, tmp_path, name, suffix):
    module, twin = pair(name, rng)
    x = images(rng, (8, 4, 6))
    module(torch.from_numpy(x))
    state = module.state_dict()
    if suffix is not None:
        pybn.save_state_dict(state, tmp_path / f"s{suffix}")
        state = pybn.load_state_dict(tmp_path / f"s{suffix}")
    twin.reset_parameters()
    twin.load_state_dict(state)
    assert list(twin.state_dict()) == list(module.state_dict())
    for key, value in twin.state_dict().items():
        assert np.array_equal(value, module.state_dict()[key]), key
        assert value.shape == tuple(module.state_dict()[key].shape)
    assert_close(array(module.eval()(torch.from_numpy(x))), twin.eval()(x), np.float32)
    with pytest.raises(TypeError, match=r"has no counterpart in torch\.nn, expected a BatchNorm"):
        twin.to_torch()
    with pytest.raises(TypeError, match=r"has no counterpart in torch\.nn, expected a BatchNorm"):
        type(twin).from_torch(module)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_module_can_be_copied_and_pickled(rng, name):
    module, _ = pair(name, rng)
    x = torch.from_numpy(images(rng, (8, 4, 6)))
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    expected = module(x)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert type(module).__name__ in repr(module)


def test_what_is_wrong_is_said(rng):
    x = torch.from_numpy(images(rng, (5, 4, 6)))
    for call, error, message in [
        (lambda: bt.GhostBatchNorm(4, 0), ValueError, "ghost_size is 0"),
        (lambda: bt.GhostBatchNorm(4, 1)(x[:, :, 0]), ValueError, r"a ghost batch has shape \(1, 4\), one value"),
        (lambda: bt.GhostBatchNorm(3, 1)(x), ValueError, "input has 4 channels on axis 1, expected 3"),
        (lambda: bt.BatchRenorm(4, rmax=0.5), ValueError, r"rmax is 0\.5"),
        (lambda: bt.BatchRenorm(4)(x[:1, :, 0]), ValueError, "one value per channel"),
        (lambda: bt.VirtualBatchNorm(4)(x), RuntimeError, "no reference batch yet"),
        (lambda: bt.VirtualBatchNorm(4).reference_forward(x[:1, :, 0]), ValueError, "several values per channel"),
        (lambda: bt.SequenceBatchNorm(4, 0), ValueError, "max_steps is 0"),
        (lambda: bt.SequenceBatchNorm(4, 6)(x[:1]), ValueError, "at no step more than one sequence"),
        (lambda: bt.SequenceBatchNorm(4, 6)(x, lengths=[7] * 5), ValueError, "lengths has values from 7 to 7"),
        (lambda: bt.SequenceBatchNorm(4, 6)(x[0, 0]), ValueError, "input has shape"),
        (lambda: bt.GhostBatchNorm(4, 2, activation="gelu"), ValueError, "activation is 'gelu'"),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bt.BatchNorm1d, bt.BatchRenorm], ids=lambda kind: kind.__module__)
def test_frozen_batch_norms_stay_in_evaluation_while_the_rest_trains(rng, kind):
    model = nn.Sequential(nn.Conv1d(4, 4, 1), kind(4), nn.Dropout(0.5)).train()
    x = torch.from_numpy(images(rng, (5, 4, 6)))
    model(x)
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    assert bt.freeze(model) is model
    twin = copy.deepcopy(model)
    for frozen in (model, twin, pickle.loads(pickle.dumps(model))):
        frozen.train()
        frozen(x).sum().backward()
        assert frozen[2].training
        assert frozen[1].weight.grad is not None
        for name, value in frozen[1].state_dict().items():
            assert torch.equal(value, before[name])
    bt.freeze(model)
    bt.unfreeze(model)
    model(x)
    assert not torch.equal(model[1].running_mean, before["running_mean"])


def test_folding_gives_back_the_network_that_batch_norms_were_inserted_in(rng):
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2), nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    original = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.from_numpy(images(rng, (64, 3, 8, 8)))
    pybn.insert(model, [x])
    folded = bt.fold(model).model
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    found = {name.replace(".linear", ""): value for name, value in folded.state_dict().items()}
    without = found.pop("4.bias")  # of a convolution that had none
    assert without.abs().max() < 1e-6
    assert found.keys() == original.keys()
    for name, value in original.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 * float(value.abs().max()), msg=name)


class TwoLayers(nn.Module):
    def __init__(self, kind=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3), kind(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 4, 1), kind(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.dropout(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bt.BatchNorm2d], ids=lambda kind: kind.__module__)
def test_reestimated_statistics_are_those_of_all_that_arrives(rng, kind, tmp_path):
    model = TwoLayers(kind).double().train()
    model.dropout.eval()
    batches = [torch.from_numpy(images(rng, (n, 3, 6, 6), np.float64)) * n for n in (4, 2, 7)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = pybn.reestimate(model, [(batch, "label") for batch in batches])
    with torch.no_grad():
        first = [model.conv1(batch) for batch in batches]
        normalized = [nn.functional.batch_norm(z, None, None, model.bn1.weight, model.bn1.bias, True) for z in first]
        second = [model.conv2(torch.relu(z)) for z in normalized]
    for layer, arrived in ((model.bn1, first), (model.bn2, second)):
        var, mean = torch.var_mean(torch.cat(arrived), (0, 2, 3), correction=0)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)
    assert found.model is model
    assert [module.training for module in (model, model.bn1, model.dropout)] == [True, True, False]
    assert not model.bn1._forward_pre_hooks
    for name, value in model.state_dict().items():
        if "running" not in name:
            assert torch.equal(value, state[name]), name

    def failing():
        yield batches[0]
        raise InterruptedError

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InterruptedError):
        pybn.reestimate(model, failing(), state=tmp_path / "s.npz", save_every=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.bn1.track_running_stats
    pybn.reestimate(model, batches, state=tmp_path / "s.npz")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_are_reestimated_as_their_numpy_layers(rng, name, frozen):
    module, twin = pair(name, rng, np.float64)
    last, twin_last = nn.BatchNorm1d(4).double(), pybn.BatchNorm1d(4, dtype=np.float64)
    model = nn.Sequential(module.double(), nn.Tanh(), last)
    if frozen:
        bt.freeze(model)
    modes = [part.training for part in model.modules()]
    data = [images(rng, (n, 4, 6), np.float64) * n for n in (5, 4, 9)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = pybn.reestimate(model, [torch.from_numpy(x) for x in data])
    layers = {"0": twin, "2": twin_last} if name != "virtual" else {"2": twin_last}
    if name == "virtual":
        assert found.left == {"0": "it has no running statistics"}
    expected = pybn.reestimate(layers, data, forward=lambda x: twin_last(np.tanh(twin(x))))
    assert list(found.statistics) == list(expected.statistics)
    for part, moments in expected.statistics.items():
        assert found.statistics[part].count == moments.count
    for layer, of_numpy in ((module, twin), (last, twin_last)):
        for key, value in of_numpy.state_dict().items():
            np.testing.assert_allclose(layer.state_dict()[key].double(), value, rtol=1e-6 if layer is module else 1e-12)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed <= {f"{i}.running_{what}" for i in "02" for what in ("mean", "var")} | {"0.num_batches_tracked"}
    assert "2.running_var" in changed
    assert bt.variants.is_frozen(last) == frozen
    assert [part.training for part in model.modules()] == modes
    assert last.momentum == 0.1
    before = last.running_var.clone()
    model.train()(torch.from_numpy(data[0]))
    assert torch.equal(last.running_var, before) == frozen, "it tracks statistics as it did before"


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_reestimated_statistics_of_steps_count_only_the_sequences_that_are_there(rng, channel_axis):
    module = bt.SequenceBatchNorm(4, 6, channel_axis=channel_axis, dtype=torch.float64)
    twin = pybn.SequenceBatchNorm(4, 6, channel_axis=channel_axis, dtype=np.float64)
    data = []
    for lengths in ([5, 2, 4], [1, 1, 3, 3]):
        shape = (len(lengths), 4, max(lengths))
        data.append((np.ascontiguousarray(np.moveaxis(images(rng, shape, np.float64), 1, channel_axis)), lengths))
    pybn.reestimate([twin], data, forward=lambda batch: twin(batch[0], lengths=batch[1]))
    by_step = copy.deepcopy(module)

    def steps(batch):
        x, lengths = torch.from_numpy(batch[0]), np.array(batch[1])
        for step in range(max(lengths)):
            by_step(x[:, :, step] if channel_axis == 1 else x[:, step], step=step, mask=step < lengths)

    pybn.reestimate(by_step, data, forward=steps)
    pybn.reestimate(module, data, forward=lambda batch: module(torch.from_numpy(batch[0]), lengths=batch[1]))
    assert twin.num_batches_tracked.tolist() == [1, 1, 1, 1, 0, 0]
    for layer in (module, by_step):
        for key, value in twin.state_dict().items():
            np.testing.assert_allclose(layer.state_dict()[key], value, rtol=1e-12, atol=1e-12, err_msg=key)
    assert module.momentum == 0.1
    assert module._observer is None


def test_inserted_batch_norms_change_no_output(rng):
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2), nn.Sequential(nn.Conv2d(4, 6, 1)),
        nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3),
    ).eval()  # fmt: skip
    x = torch.from_numpy(images(rng, (64, 3, 8, 8)))
    with torch.no_grad():
        before = model(x)
        first = model[0](x)
    found = pybn.insert(model, [x[:40], x[40:]])
    assert list(found.statistics) == ["0", "2", "3.0", "7", "9"]
    with torch.no_grad():
        after = model(x)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert torch.equal(after.argmax(1), before.argmax(1))
    var, mean = torch.var_mean(first.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(model[0].batch_norm.running_mean, mean.float())
    torch.testing.assert_close(model[0].batch_norm.running_var, var.float())
    # The reverse: torch's own fusion of a convolution and its batch norm.
    weight = model[0].linear.weight.clone()
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0].linear, model[0].batch_norm)
    torch.testing.assert_close(fused.weight, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fused.bias, model[0].linear.bias, rtol=1e-5, atol=1e-6)
    two = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert list(pybn.insert(two, [torch.rand(4, 3)], after=["1"]).statistics) == ["1"]
    assert isinstance(two[0], nn.Linear)
    for call, message in [
        (lambda: pybn.insert(model, [x], after=["0.linear"]), "'0.linear': it has a batch norm already"),
        (lambda: pybn.insert(model, [x], after=["1"]), "there is no linear operator of that name"),
        (lambda: pybn.insert(nn.Linear(3, 2), [torch.ones(4, 3)]), "no operator after which"),
        (lambda: pybn.insert(nn.Sequential(nn.Linear(3, 2)), [torch.ones(4, 5, 3)]), "is linear and gives 3 axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
