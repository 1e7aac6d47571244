"""What a metric is: a named figure of a clip or of a set of clips, with its unit and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A named figure, NaN where it was not measured. `storage.schema.Measure` has the same first four fields, for
    figures that a dataset keeps."""

    name: str
    """As in metrics.json."""
    unit: str
    """As it stands behind a figure, such as ` dB`; empty for plain numbers."""
    higher_is_better: bool
    """The direction."""
    doc: str
    """What is measured."""
    label: str = ""
    """What tables call it; the name where it is empty."""
    per_set: bool = False
    """Whether it is a figure of a set of clips, and not of each."""

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.label or self.name.replace("_", " ")

    def worst(self, values: Iterable[float]) -> float:
        """The worst of the values that were measured; NaN where none was."""
        finite = [value for value in values if math.isfinite(value)]
        return (min if self.higher_is_better else max)(finite) if finite else math.nan

    def meets(self, value: float, bound: float) -> bool:
        """Whether a value is no worse than a bound; what was not measured is not blamed."""
        return math.isnan(value) or (value >= bound if self.higher_is_better else value <= bound)
