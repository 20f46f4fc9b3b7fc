"""Many claims at once: which verdicts stand when the chance that any of them is wrong is to stay small."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float], error: float) -> list[bool]:
    """Holm's step-down correction: which of the hypotheses are rejected, whatever depends on what.

    Of m, the smallest p is held against error/m, the next against error/(m - 1), and so on up to the first that is
    larger. The chance that any rejected hypothesis is true is at most `error`.
    """
    rejected = [False] * len(p_values)
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > error / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected
