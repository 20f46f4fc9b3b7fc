"""Judgements made up from preferences, as if read from a file of annotations."""

from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.annotations import Annotations


def judged(preferences, name="run", reference_length=10.0):
    prompts = pd.DataFrame(
        {
            "instruction": [f"prompt {number:03d}" for number in range(len(preferences))],
            "preference": np.array(preferences, dtype=np.float64),
            "model_length": 5.0,
            "reference_length": reference_length,
        }
    )
    return Annotations(Path(f"{name}.json"), name, "reference", "judge", prompts)
