"""How the runs of a figure are told apart: one colour, line and marker per method, in every figure of this kit.

Methods go by their families, such as "ε-DPO with its criterion in bfloat16". Runs of one family share its colour, in
shades, and differ in line and marker, so that no run is mistaken for another method's.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.colors import to_hex, to_rgb

from epsdpo.experiment import Experiment
from epsdpo.plots.style import METHOD_COLOURS


class Look(NamedTuple):
    """How a family is drawn: a colour, matplotlib's name of a line style and of a marker."""

    colour: str
    line: str
    marker: str


STARTING_MODEL = "starting model"  # the policy before preference training, beside what became of it
OTHER = "other"  # TRL's other losses and trainers, and runs of which only a log is known

# What shares a colour differs in line and marker.
FAMILIES = {
    "dpo": Look(METHOD_COLOURS["dpo"], "--", "s"),
    "epsilon_dpo bfloat16": Look(METHOD_COLOURS["epsilon_dpo bfloat16"], "-", "o"),
    "epsilon_dpo bfloat16_logits": Look(METHOD_COLOURS["epsilon_dpo bfloat16_logits"], "--", "X"),
    "epsilon_dpo float16": Look(METHOD_COLOURS["epsilon_dpo bfloat16"], ":", "P"),
    "epsilon_dpo float32": Look(METHOD_COLOURS["epsilon_dpo float32"], "-.", "^"),
    "beta_dpo": Look(METHOD_COLOURS["beta_dpo"], ":", "D"),
    "tr_dpo hard": Look(METHOD_COLOURS["tr_dpo"], "-", "v"),
    "tr_dpo soft": Look(METHOD_COLOURS["tr_dpo"], "--", "<"),
    "ipo": Look(METHOD_COLOURS["ipo"], "-.", "P"),
    "simpo": Look(METHOD_COLOURS["simpo"], ":", "X"),
    STARTING_MODEL: Look(METHOD_COLOURS[STARTING_MODEL], ":", "o"),
    OTHER: Look(METHOD_COLOURS[OTHER], "-", "*"),
}
_LINES, _MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
# Of the shades of one colour, towards white. None is darker: a dark sky blue would pass for ε-DPO's blue.
_LIGHTEST = 0.6


def family_of(experiment: Experiment) -> str:
    """The family in `FAMILIES` that an experiment belongs to, by its method and the settings that make it another."""
    match experiment.method:
        case "epsilon_dpo":
            return f"epsilon_dpo {experiment.criterion()['criterion_dtype']}"
        case "tr_dpo":
            # TRL's own share of the policy in the new reference is 0.6; with 1 the policy becomes the reference.
            alpha = experiment.training_arguments().get("ref_model_mixup_alpha", 0.6)
            return "tr_dpo hard" if alpha == 1.0 else "tr_dpo soft"
        case method:
            return method if method in FAMILIES else OTHER


def run_looks(families: Mapping[str, str]) -> dict[str, Look]:
    """How to draw each of several runs: a family's own look for its only run, else shades, lines and markers.

    Args:
        families: title of a run -> its family.
    """
    counts, places, looks = Counter(families.values()), Counter(), {}
    for title, family in families.items():
        looks[title] = _variant(FAMILIES[family], places[family], counts[family])
        places[family] += 1
    return looks


def _variant(look: Look, place: int, count: int) -> Look:
    """The look of the `place`-th of `count` runs of a family; the first has the family's own."""
    if place == 0:
        return look
    shade = _LIGHTEST * place / (count - 1)
    colour = to_hex([(1 - shade) * part + shade for part in to_rgb(look.colour)])
    line = _LINES[(_LINES.index(look.line) + place) % len(_LINES)]
    marker = _MARKERS[(_MARKERS.index(look.marker) + place) % len(_MARKERS)]
    return Look(colour, line, marker)


def line_of(look: Look) -> dict[str, Any]:
    """A look as keyword arguments of a line without markers."""
    return {"color": look.colour, "linestyle": look.line}
