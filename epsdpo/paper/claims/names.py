"""The measures of a run that claims can be about: their names, units and meaning."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """How a number of one run is called for people, and its unit."""

    label: str
    unit: str


WIN_RATE_UNIT = "points"
AT_LARGEST = "_at_largest"  # after a measure: the share of its pairs that hold up to the largest ε tried
_BOUND = "bound of ε, mean over the checkpoints"

MEASURES = {
    "win_rate": Measure("win rate over the SFT model", WIN_RATE_UNIT),
    "length_controlled_win_rate": Measure("length-controlled win rate over the SFT model", WIN_RATE_UNIT),
    "length_effect": Measure("length-controlled less raw win rate", WIN_RATE_UNIT),
    "gold_gain": Measure("gold reward of the policy less the SFT model's", "gold reward"),
    "first_win_rate": Measure("win rate at the first checkpoint", WIN_RATE_UNIT),
    "middle_forward_kl": Measure("KL(π_ref‖π) per response at the checkpoint nearest to half of training", "nats"),
    "forward_kl_per_response": Measure("KL(π_ref‖π) per response", "nats"),
    "reverse_kl_per_response": Measure("KL(π‖π_ref) per response", "nats"),
    "relaxed": Measure("share of pairs that chose β⁻", "% of pairs"),
    "tied": Measure("share of pairs that kept β", "% of pairs"),
    "tightened": Measure("share of pairs that chose β⁺", "% of pairs"),
    "mean_step": Measure("mean step, β⁻ as +1 and β⁺ as −1", "steps"),
    "beta_travel": Measure("β at the end, relative to the start", "of the first β"),
    "tightened_margin": Measure(
        "implicit reward margin of pairs that chose β⁺, less that of all others, in the second half of training",
        "reward",
    ),
    # With a checkpoint per tenth of training, the early one is that at a tenth, the late ones are from a fifth on.
    "bound_early_bfloat16": Measure(f"{_BOUND} before 15 % of training, bfloat16 criterion", "ε"),
    "bound_late_bfloat16": Measure(f"{_BOUND} after 15 % of training, bfloat16 criterion", "ε"),
    "bound_rise_bfloat16": Measure(
        f"{_BOUND} after 15 % of training less that over those before, bfloat16 criterion", "ε"
    ),
    "bound_early_float32": Measure(f"{_BOUND} before 15 % of training, float32 criterion", "ε"),
    "bound_late_float32": Measure(f"{_BOUND} after 15 % of training, float32 criterion", "ε"),
    "step_cost": Measure("time of a step, more than that of DPO computed alike", "%"),
}
