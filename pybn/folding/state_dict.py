"""Folding a dictionary of arrays, such as a checkpoint, whose layers are known by the names of their arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from pybn.folding.affine import Array
from pybn.folding.reasons import FoldError
from pybn.folding.weights import fold_conv, fold_linear


def fold_state_dict(
    state: Mapping[str, Array], pairs: Iterable[tuple[str, str]], *, eps: float = 1e-5, transposed: Iterable[str] = ()
) -> dict[str, Array]:
    """Fold the batch norms of a dictionary of arrays into the convolutions or linear layers before them.

    A layer is named by the prefix that its arrays share: ``"layer1.0.conv1"`` has
    ``layer1.0.conv1.weight`` and maybe ``layer1.0.conv1.bias``; a batch norm has ``running_mean`` and
    ``running_var``, maybe ``weight``, ``bias`` and ``num_batches_tracked``. These are PyTorch's names.

    Parameters
    ----------
    state : mapping of str to ndarray
        Left untouched; other arrays than those of `pairs` are in the result as they are.
    pairs : iterable of (str, str)
        Prefixes: a convolution or linear layer, and the batch norm that follows it, and only it. A weight
        of two axes is a linear layer's, of shape ``(out, in)``; one of more is a convolution's.
    eps : float
        What the batch norms add to the variance.
    transposed : iterable of str
        Those layers of `pairs` that are transposed convolutions, grouped or not.

    Returns
    -------
    dict
        A new dictionary without the batch norms. Every layer of `pairs` has a ``bias`` in it.

    Raises
    ------
    KeyError
        If an array is missing.
    ValueError
        If a prefix is in two pairs, or the shapes of a pair do not fit.
    FoldError
        If a result cannot be represented. A subclass of ValueError.

    Examples
    --------
    >>> folded = fold_state_dict(state, [("conv1", "bn1"), ("fc", "bn2")])  # doctest: +SKIP
    """
    result = dict(state)
    kinds = frozenset([transposed] if isinstance(transposed, str) else transposed)
    seen: set[str] = set()
    for layer, norm in pairs:
        for prefix in (layer, norm):
            if prefix in seen:
                raise ValueError(f"pairs has {prefix!r} twice, expected every layer and batch norm in one pair")
            seen.add(prefix)
        for name in (f"{layer}.weight", f"{norm}.running_mean", f"{norm}.running_var"):
            if name not in state:
                raise KeyError(f"state has no {name!r}")
        weight = np.asarray(state[f"{layer}.weight"])
        parameters = (
            weight,
            state.get(f"{layer}.bias"),
            state[f"{norm}.running_mean"],
            state[f"{norm}.running_var"],
            state.get(f"{norm}.weight"),
            state.get(f"{norm}.bias"),
            eps,
        )
        where = f"{layer} and {norm}"
        try:
            if weight.ndim == 2:
                folded = fold_linear(*parameters)
            elif layer in kinds:
                # The output axis counts within a group, so the number of channels tells that of groups.
                channels = np.size(state[f"{norm}.running_mean"])
                groups = max(channels // weight.shape[1], 1) if weight.ndim > 1 and weight.shape[1] else 1
                folded = fold_conv(*parameters, transposed=True, groups=groups)
            else:
                folded = fold_conv(*parameters)
        except FoldError as error:
            raise FoldError(error.reason, f"{where}: {error}") from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        result[f"{layer}.weight"], result[f"{layer}.bias"] = folded
        for name in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"):
            result.pop(f"{norm}.{name}", None)
    unknown = kinds - seen
    if unknown:
        raise ValueError(f"transposed names {sorted(unknown)[0]!r}, which is in no pair")
    return result
