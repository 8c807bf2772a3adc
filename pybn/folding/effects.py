"""Which values of the folded model show what each fold did, also after later folds have changed these again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir


class Effect:
    """A value that shows the effect of folds, as long as nothing changes it; then, what shows it instead."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value
        self.instead: tuple[Effect, ...] = ()


class Effects:
    """What shows the effects of all folds so far.

    A chain of merges moves the effects of all of them on with every merge. That is noted once per value, not once
    per fold, and only read at the end: 3000 multiplications in a row took 21 s otherwise, and most of that for this.
    """

    def __init__(self) -> None:
        self._current: dict[ir.Value, Effect] = {}
        self._past: list[Effect] = []

    def show(
        self, values: Iterable[ir.Value], *, gone: Collection[ir.Value], moved: Mapping[ir.Value, ir.Value]
    ) -> list[Effect]:
        """Note where a fold shows.

        Parameters
        ----------
        values : iterable of ir.Value
            Where it shows, and where the effects of earlier folds show that have been in values that are `gone`.
        gone : collection of ir.Value
            Values that are no more, or carry other data.
        moved : mapping
            Values whose data is now another value's.

        Returns
        -------
        list
            The effects of this fold, keys of what `shown` returns.
        """
        past = [self._current.pop(value) for value in dict.fromkeys(gone) if value in self._current]
        for old, new in moved.items():
            if old in self._current:
                self._current[new] = self._current.pop(old)
                self._current[new].value = new
        here = [self._current.setdefault(value, Effect(value)) for value in dict.fromkeys(values)]
        for effect in past:
            effect.instead = tuple(here)
        self._past += past
        return here

    def shown(self) -> dict[Effect, tuple[ir.Value, ...]]:
        """Find the values that show every effect at the end."""
        values: dict[Effect, tuple[ir.Value, ...]] = {item: (item.value,) for item in self._current.values()}
        # What shows an effect instead was current when that ended, so it ended later or never.
        for effect in reversed(self._past):
            values[effect] = tuple(dict.fromkeys(value for other in effect.instead for value in values[other]))
        return values
