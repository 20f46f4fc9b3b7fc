"""How prepared data are shown: the figure of token lengths, and one pair as the model reads it."""

import html
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedTokenizerBase

from epsdpo.plots.style import CHOSEN, NEUTRAL, REJECTED, new_figure

PROMPT = NEUTRAL

_BINS = 40


def length_histogram(lengths: pd.DataFrame) -> Figure:
    """Histograms of token counts: a row of panels per split, prompts on the left and both completions on the right.

    Args:
        lengths: of `token_lengths`; columns split, part and tokens.
    """
    splits = list(dict.fromkeys(lengths["split"]))
    figure, panels = new_figure(9.0, 0.8 + 2.6 * len(splits), rows=len(splits), columns=2)
    rows = list(zip(panels[::2], panels[1::2], strict=True))
    for row, split in zip(rows, splits, strict=True):
        tokens = {part: frame["tokens"] for part, frame in lengths[lengths["split"] == split].groupby("part")}
        _histogram(row[0], {"prompt": (tokens["prompt"], PROMPT)}, longest=_longest(lengths, ["prompt"]))
        completions = {"chosen": (tokens["chosen"], CHOSEN), "rejected": (tokens["rejected"], REJECTED)}
        _histogram(row[1], completions, longest=_longest(lengths, list(completions)))
        row[0].set_ylabel(f"{split}: pairs")
    rows[-1][0].set_xlabel("tokens of the prompt, as cut")
    rows[-1][1].set_xlabel("tokens of the completion, end token included")
    figure.suptitle("How long prompts and completions are (dotted: medians)")
    return figure


def _longest(lengths: pd.DataFrame, parts: list[str]) -> int:
    return int(lengths.loc[lengths["part"].isin(parts), "tokens"].max())


def _histogram(axes, parts: dict[str, tuple[pd.Series, str]], longest: int) -> None:
    """Outlined histograms over the same bins of whole tokens, with the medians in the legend."""
    width = -(-longest // _BINS)
    edges = np.arange(0, longest + width, width) + 0.5
    for name, (tokens, colour) in parts.items():
        label = f"{name}, median {tokens.median():g}"
        axes.hist(tokens, edges, histtype="stepfilled", color=colour, alpha=0.25)
        axes.hist(tokens, edges, histtype="step", color=colour, linewidth=1.8, label=label)
        axes.axvline(tokens.median(), color=colour, linestyle=":", linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def pair_html(pair: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One prepared pair, decoded from its token ids with special tokens visible; the completions are marked.

    The text comes from data or a model and is escaped.
    """
    prompt, chosen, rejected = (
        html.escape(tokenizer.decode(pair[f"{part}_ids"])) for part in ("prompt", "chosen", "rejected")
    )
    blocks = [
        f"<p><b>{name}</b> ({len(pair[f'{name}_ids'])} tokens after {len(pair['prompt_ids'])} of the prompt)</p>"
        '<pre style="white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 6px">'
        f'{prompt}<mark style="background: {colour}40">{text}</mark></pre>'
        for name, text, colour in (("chosen", chosen, CHOSEN), ("rejected", rejected, REJECTED))
    ]
    return f"<p>Pair <code>{html.escape(pair['pair_id'])}</code></p>" + "".join(blocks)
