"""The measures of a run that claims can be about: their names, units and meaning. Nothing is computed here."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """How a number of one run is called for people, and its unit."""

    label: str
    unit: str


WIN_RATE_UNIT = "points"

MEASURES = {
    "win_rate": Measure("win rate over the SFT model", WIN_RATE_UNIT),
    "length_controlled_win_rate": Measure("length-controlled win rate over the SFT model", WIN_RATE_UNIT),
    "length_effect": Measure("length-controlled less raw win rate", WIN_RATE_UNIT),
    "gold_gain": Measure("gold reward of the policy less the SFT model's", "gold reward"),
    "first_win_rate": Measure("win rate at the first checkpoint", WIN_RATE_UNIT),
    "middle_forward_kl": Measure("KL(π_ref‖π) per response at the middle checkpoint", "nats"),
    "forward_kl_per_response": Measure("KL(π_ref‖π) per response", "nats"),
    "reverse_kl_per_response": Measure("KL(π‖π_ref) per response", "nats"),
    "relaxed": Measure("share of pairs that chose β⁻", "% of pairs"),
    "tied": Measure("share of pairs that kept β", "% of pairs"),
    "tightened": Measure("share of pairs that chose β⁺", "% of pairs"),
    "mean_step": Measure("mean step, β⁻ as +1 and β⁺ as −1", "steps"),
    "beta_travel": Measure("β at the end, relative to the start", "of the first β"),
    "tightened_margin": Measure("implicit reward margin of pairs that chose β⁺, less that of all others", "reward"),
    "bound_early_bfloat16": Measure("bound of ε at a tenth of the epoch, bfloat16 criterion", "ε"),
    "bound_late_bfloat16": Measure("bound of ε after a fifth of the epoch, bfloat16 criterion", "ε"),
    "bound_rise_bfloat16": Measure("that bound after a fifth of the epoch less at a tenth, bfloat16 criterion", "ε"),
    "bound_early_float32": Measure("bound of ε at a tenth of the epoch, float32 criterion", "ε"),
    "bound_late_float32": Measure("bound of ε after a fifth of the epoch, float32 criterion", "ε"),
    "step_cost": Measure("time of a step, more than that of DPO computed alike", "%"),
}
