"""Population statistics over a data set: re-estimated, rather than left to a moving average.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 (PreciseBN): after training, run batches through the
network as in training and pool, for every batch norm, the statistics of what arrives there::

    mean = sum(n_i mean_i) / n        var = sum(n_i (var_i + (mean_i - mean)^2)) / n        n = sum(n_i)

which are those of all batches' values put together. What arrives at a batch norm depends on how those before it
normalize; here, as in the paper, with each batch's own statistics. So one pass over the data is enough, and it does not
matter what the running statistics were before.

What a model is, and how batches run through it, is known by a `Subject`: of NumPy layers here, of torch modules in
`pybn.torch`, of ONNX models in `pybn.stages`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pybn._arrays import Array
from pybn._merge import Moments, merge, moments
from pybn._one_thread import one_thread
from pybn.layers import Observer, _BatchNorm
from pybn.sequence import SequenceBatchNorm, name_of_step, names_of_steps, population

Observe = Callable[[str, Array, int], None]  # a batch norm's name, what arrives there, its channel axis
Progress = Callable[[int, "int | None"], None]  # batches done, and those of all, if that is known
Partition = Callable[[], Iterable[Any]]


class Subject(Protocol):
    """A model whose batch norms are to be re-estimated. It can be pickled."""

    names: list[str]
    optional: Collection[str]  # of the names, those at which no values need arrive: steps of sequences
    left: dict[str, str]  # what would have been one of them, and why it is not

    def running(self, observe: Observe) -> contextlib.AbstractContextManager[Callable[[Any], None]]:
        """What runs a batch through the model, in which batch norms normalize with the batch's own statistics and tell
        `observe` what arrives. The model is as it was when the block ends.
        """
        ...

    def fingerprint(self) -> str:
        """Differs for models in which other values would arrive."""
        ...

    def finish(self, statistics: Mapping[str, Moments]) -> Any:
        """The model with these population statistics. It is as it was after an error."""
        ...


@dataclass(frozen=True)
class Population:
    """What `reestimate` found.

    Attributes
    ----------
    model : the model
        With the new statistics: the layers or module given, changed, or for ONNX a new ModelProto.
    statistics : dict from str to Moments
        ``count``, ``mean`` and ``var`` (biased) in float64 by the name of the batch norm; for a `SequenceBatchNorm`
        by ``name[0]``, ``name[1]``, ..., of every step at which there were values.
    batches : int
        How many batches there were, or partitions.
    left : dict from str to str
        Batch norms that are as they were, and why.
    """

    model: Any
    statistics: dict[str, Moments]
    batches: int
    left: dict[str, str]


def reestimate(
    model: Any,
    data: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any], Any] | None = None,
    partitions: Sequence[Partition] | None = None,
    client: Any = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
) -> Population:
    """Replace the running statistics of batch norms by the statistics of a whole data set, in one pass over it.

    Every batch counts by its size. Weights stay as they are. All other layers of a torch module are in evaluation.

    Parameters
    ----------
    model : a layer, a sequence or mapping of layers, a torch module, a path to an ONNX model, or an onnx.ModelProto
        Layers and modules are changed in place, when all batches have run; ONNX models are not, but returned anew.
    data : iterable
        Batches: of a single layer arrays, of layers what `forward` takes, of a torch module its input (or a tuple or
        list that begins with it), of an ONNX model a dictionary of arrays by the names of its inputs. They are drawn
        one after the other, so a data set need not fit in memory.
    forward : callable, optional
        Runs a batch through the network that the layers, or the module, are part of. Needed for several layers.
    partitions : sequence of callables, instead of data
        Each returns an iterable of batches. Their statistics are merged in the order of the sequence, whoever computed
        them and whenever, and torch and NumPy's BLAS run them on one thread each, as their sums depend on how many
        there are: the result has the same bits here and on a cluster.
    client : dask.distributed.Client, optional
        Computes partitions on a cluster. Model, `forward` and partitions are sent there; those of a worker that is lost
        are computed again by another.
    state : path, optional
        Where to keep what is done after every `save_every` batches, or partitions. If the file is there, this work
        is not done again: the batches that it covers are drawn, and passed over. It is removed at the end. The data
        must be the same, in the same order; the model is checked.
    progress : callable, optional
        Called with the number of batches (or partitions) done, and with that of all, or None.

    Returns
    -------
    Population

    Raises
    ------
    TypeError
        A model of another kind, or both or none of `data` and `partitions`.
    ValueError
        Layers without running statistics, no values at all, or a state of another model. Nothing has changed then, nor
        after any error while batches run.
    """
    subject = subject_of(model, forward)
    if not subject.names:
        raise ValueError("model has no batch norm that can be re-estimated")
    return populate(subject, data, partitions, client, state, save_every, progress)


def populate(
    subject: Subject,
    data: Iterable[Any] | None,
    partitions: Sequence[Partition] | None,
    client: Any,
    state: str | os.PathLike[str] | None,
    save_every: int,
    progress: Progress | None,
    data_is: str = "",
) -> Population:
    """Run the data through a model, and finish it with the statistics of what arrived. See `reestimate`.

    A state of data with another `data_is` is refused.
    """
    if (data is None) == (partitions is None):
        raise TypeError("expected either data or partitions")
    if client is not None and partitions is None:
        raise TypeError("client is given without partitions, which are what it computes")
    if save_every < 1:
        raise ValueError(f"save_every is {save_every}, expected at least 1")
    if partitions is None:
        assert data is not None
        kept = _State(subject, state, "batches", data_is)
        statistics = _over_batches(subject, data, kept, save_every, progress)
    else:
        kept = _State(subject, state, f"{len(partitions)} partitions", data_is)
        statistics = _over_partitions(subject, partitions, client, kept, save_every, progress)
    empty = [name for name in subject.names if not statistics[name].count and name not in subject.optional]
    if empty:
        raise ValueError(f"no values arrived at {', '.join(empty[:8])}, expected some in data")
    model = subject.finish(statistics)
    kept.remove()
    return Population(
        model, {name: found for name, found in statistics.items() if found.count}, kept.done, subject.left
    )


def subject_of(model: Any, forward: Callable[[Any], Any] | None) -> Subject:
    """What knows how to run a model."""
    if is_torch_module(model):
        from pybn.torch.population import Modules

        return Modules(model, forward)
    if isinstance(model, (str, os.PathLike)) or type(model).__module__.startswith("onnx"):
        from pybn.stages import OnnxModel

        if forward is not None:
            raise TypeError("forward is given with an ONNX model, which says itself how it runs")
        return OnnxModel(model)
    return Layers(model, forward)


def is_torch_module(model: Any) -> bool:
    """Say so without importing torch."""
    return any(base.__module__.startswith("torch.") and base.__name__ == "Module" for base in type(model).__mro__)


# ---- one pass


class Collector:
    """Adds up the moments of what arrives, batch by batch in their order."""

    def __init__(self, statistics: Mapping[str, Moments]) -> None:
        self.statistics = dict(statistics)

    def observe(self, name: str, x: Array, channel_axis: int) -> None:
        """Add a batch."""
        self.statistics[name] = merge([self.statistics[name], moments(x, channel_axis)])


def nothing_yet(subject: Subject) -> dict[str, Moments]:
    """No values at any batch norm."""
    return {name: Moments(0, *np.zeros((3, 0))) for name in subject.names}


def of_partition(subject: Subject, partition: Partition) -> dict[str, Moments]:
    """The moments of all batches of one partition: what a worker computes."""
    collector = Collector(nothing_yet(subject))
    with one_thread(), subject.running(collector.observe) as run:
        for batch in partition():
            run(batch)
    return collector.statistics


def _over_batches(
    subject: Subject, data: Iterable[Any], kept: _State, save_every: int, progress: Progress | None
) -> dict[str, Moments]:
    collector = Collector(kept.parts[0] if kept.parts else nothing_yet(subject))
    hint = operator.length_hint(data, -1)  # not len: a DataLoader may have one that raises a TypeError
    total = hint if hint >= 0 else None
    with subject.running(collector.observe) as run:
        for batch in islice(data, kept.done, None):
            run(batch)
            kept.done += 1
            kept.parts = [collector.statistics]
            if kept.done % save_every == 0:
                kept.save()
            if progress is not None:
                progress(kept.done, total)
    return collector.statistics


def _over_partitions(
    subject: Subject,
    partitions: Sequence[Partition],
    client: Any,
    kept: _State,
    save_every: int,
    progress: Progress | None,
) -> dict[str, Moments]:
    left = partitions[kept.done :]
    for part in _on_cluster(client, subject, left) if client is not None else (of_partition(subject, p) for p in left):
        kept.parts.append(part)
        kept.done += 1
        if kept.done % save_every == 0:
            kept.save()
        if progress is not None:
            progress(kept.done, len(partitions))
    if not kept.parts:
        return nothing_yet(subject)
    return {name: merge([part[name] for part in kept.parts]) for name in subject.names}


def _on_cluster(client: Any, subject: Subject, partitions: Sequence[Partition]) -> Iterator[dict[str, Moments]]:
    """The partitions' moments in order. A task that a lost worker had is computed again: it depends on nothing else."""
    import cloudpickle  # with distributed; knows the functions and classes of a notebook, too

    # As bytes, because the tasks that run in the threads of one worker at once need a model each.
    model = client.scatter(cloudpickle.dumps(subject), broadcast=True, hash=False)
    tasks = [client.submit(_on_worker, model, partition, pure=False) for partition in partitions]
    try:
        for task in tasks:
            yield task.result()
    finally:
        client.cancel(tasks)


def _on_worker(subject: bytes, partition: Partition) -> dict[str, Moments]:
    return of_partition(pickle.loads(subject), partition)


class _State:
    """How far the work is: the moments of what is done, in memory and, if there is a path, in a file."""

    def __init__(self, subject: Subject, path: str | os.PathLike[str] | None, kind: str, data_is: str) -> None:
        self.path = None if path is None else Path(path)
        self.done = 0
        self.parts: list[dict[str, Moments]] = []
        self._names = subject.names
        self._head = {"format": 1, "kind": kind, "names": subject.names, "model": "", "data": data_is}
        if self.path is not None:
            self._head["model"] = subject.fingerprint()
            if self.path.exists():
                self._load(self.path)

    def save(self) -> None:
        """Write the file so that it is the old one or the new one, never a mixture."""
        if self.path is None:
            return
        from pybn.folding import disk

        arrays: dict[str, Any] = {"head": np.array(json.dumps({**self._head, "done": self.done}))}
        for number, part in enumerate(self.parts):
            for index, name in enumerate(self._names):
                for field in fields(Moments):
                    arrays[f"{number}.{index}.{field.name}"] = getattr(part[name], field.name)
        with disk.replacing(self.path) as file:
            np.savez(file, **arrays)

    def remove(self) -> None:
        """Remove the file, whose work is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                done = head.pop("done")
                parts = 1 if head["kind"] == "batches" else done
                loaded = [
                    {
                        name: Moments(
                            int(arrays[f"{number}.{index}.count"]),
                            *(arrays[f"{number}.{index}.{field.name}"] for field in fields(Moments)[1:]),
                        )
                        for index, name in enumerate(head["names"])
                    }
                    for number in range(parts)
                ]
        except OSError as error:
            raise ValueError(f"state {str(path)!r}: {error.strerror or error}") from error
        except Exception as error:  # zipfile, json and NumPy each raise their own
            raise ValueError(f"state {str(path)!r} is not one that reestimate wrote") from error
        for what, here in self._head.items():
            if head.get(what) != here:
                raise ValueError(
                    f"state {str(path)!r} is of another {what} than this work's; remove it to begin from the beginning"
                )
        self.done, self.parts = done, loaded


# ---- NumPy layers


class Layers:
    """Layers of pybn, and what runs a batch through them."""

    def __init__(self, layers: Any, forward: Callable[[Any], Any] | None) -> None:
        self._given = layers
        if isinstance(layers, _BatchNorm):
            self._layers = {type(layers).__name__: layers}
            forward = layers if forward is None else forward
        elif isinstance(layers, Mapping):
            self._layers = dict(layers)
        elif isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
            self._layers = {str(number): layer for number, layer in enumerate(layers)}
        else:
            raise TypeError(
                f"model is a {type(layers).__name__}, expected layers of pybn, a torch module, or an ONNX model"
            )
        for name, layer in self._layers.items():
            if not isinstance(layer, _BatchNorm):
                raise TypeError(f"layer {name!r} is a {type(layer).__name__}, expected a batch norm of pybn")
            if layer.running_mean is None:
                raise ValueError(f"layer {name!r} is a {type(layer).__name__} without running statistics")
        if forward is None:
            raise TypeError("forward is None, expected what runs a batch through a network of several layers")
        self._forward = forward
        steps = {
            name: names_of_steps(name, layer.max_steps)
            for name, layer in self._layers.items()
            if isinstance(layer, SequenceBatchNorm)
        }
        self.names = [part for name in self._layers for part in steps.get(name, [name])]
        self.optional: Collection[str] = {part for parts in steps.values() for part in parts}
        self.left: dict[str, str] = {}

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Callable[[Any], None]]:
        """See `Subject`."""
        before = {name: dict(vars(layer)) for name, layer in self._layers.items()}
        copies = {name: layer.state_dict() for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                layer.train().unfreeze()
                layer.momentum = 1.0  # a step of sequences may use an earlier step's statistics: the batch's own
                layer._observer = observer(observe, name, layer.channel_axis)
            yield self._run
        finally:
            for name, layer in self._layers.items():
                vars(layer).update(before[name])
                layer.load_state_dict(copies[name])

    def _run(self, batch: Any) -> None:
        self._forward(batch)

    def fingerprint(self) -> str:
        """See `Subject`. Running statistics play no part."""
        digest = hashlib.sha256()
        for name, layer in self._layers.items():
            digest.update(f"{name} {layer!r}".encode())
            for parameter in (layer.weight, layer.bias):
                digest.update(b"-" if parameter is None else parameter.tobytes())
        return digest.hexdigest()

    def finish(self, statistics: Mapping[str, Moments]) -> Any:
        """See `Subject`."""
        before = {name: layer.state_dict() for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                layer.load_state_dict({**before[name], **_statistics_of(layer, name, statistics)})
        except BaseException:
            for name, layer in self._layers.items():
                layer.load_state_dict(before[name])
            raise
        return self._given


def observer(observe: Observe, name: str, channel_axis: int) -> Observer:
    """What a layer that has a name in the network tells of its inputs."""
    return lambda x, step: observe(name if step is None else name_of_step(name, step), x, channel_axis)


def _statistics_of(layer: _BatchNorm, name: str, statistics: Mapping[str, Moments]) -> dict[str, Array]:
    """What changes in the layer's state."""
    if isinstance(layer, SequenceBatchNorm):
        assert layer.num_batches_tracked is not None
        return population(name, statistics, layer.num_batches_tracked)
    return {"running_mean": statistics[name].mean, "running_var": statistics[name].var}
