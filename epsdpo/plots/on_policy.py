"""The figure of sampled responses: how their scores are spread."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from epsdpo.plots.style import CHOSEN, NEUTRAL, REJECTED, new_figure


def score_histograms(responses: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Scores of all responses, and of those that became chosen and rejected, as counts.

    Args:
        responses: column score; NaN is left out.
        pairs: chosen_score and rejected_score.
    """
    figure, (axes,) = new_figure(height=3.4)
    scores = responses["score"].dropna()
    edges = np.histogram_bin_edges(scores, bins=30)
    axes.hist(scores, edges, color=NEUTRAL, alpha=0.35, label="all responses")
    for column, colour in (("chosen_score", CHOSEN), ("rejected_score", REJECTED)):
        name = column.removesuffix("_score")
        axes.hist(pairs[column], edges, color=colour, histtype="step", linewidth=1.8, label=name)
    axes.set_xlabel("score by the ranker")
    axes.set_ylabel("responses")
    axes.set_title("Scores of the sampled responses")
    axes.legend(frameon=False)
    return figure
