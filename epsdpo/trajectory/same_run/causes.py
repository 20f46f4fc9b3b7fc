"""What a run's first departure from the published one points to.

Only numbers are looked at, never the config: that says what was asked for, and not what was done.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from epsdpo.trajectory.same_run.bands import Bands, response_of
from epsdpo.trajectory.same_run.departures import Departure
from epsdpo.trajectory.same_run.quantities import RunNumbers

DATA, ORDER, TOKENISATION, TRUNCATION = "data", "order", "tokenisation", "truncation"
START, REFERENCE, PRECISION = "start weights", "reference", "precision of the models"
EPSILON, RULE, CRITERION, LOSS = "ε", "β rule", "arithmetic of the criterion", "arithmetic of the loss"
SCHEDULE, BATCH, UPDATE, EVALUATION = "schedule", "batch", "gradient or optimiser", "evaluation"
ANY = "models, training or data"

_ROUNDED = 0.02  # relative; what half precision does to a log-probability, and another model exceeds
_ALIKE = 1e-6
_LONGER = 0.02  # of an update, by which another learning rate shows

Cause = tuple[str, str]  # its name, and a sentence


def cause_of(run: RunNumbers, bands: Bands, departure: Departure) -> Cause:
    """The likeliest cause of a departure, and what speaks for it."""
    if departure.step is None:
        return _evaluation(departure)
    if departure.quantities[0] == "pair_ids" and not bands.same_data:
        return ORDER, "pairs of other numbers, whose texts differ anyhow: seed or sampling, or else source or filters"
    if len(bands.steps_of(departure.quantities[0], departure.step)) > 1:
        if departure.quantities[0] in ("relaxed", "tightened"):
            return CRITERION, "of log-probabilities within their intervals other shares of the pairs take a step"
        return ANY, "the run made data of its own, so that it cannot be followed step by step"
    return _OF[departure.quantities[0]](run.steps, bands.peers[0].steps, departure)


def _evaluation(departure: Departure) -> Cause:
    if departure.quantities[0] == "answers":
        return EVALUATION, "the reference answers otherwise: temperature, top-p, seed, length or prompts"
    return EVALUATION, "training is the published one, and its evaluation is not: policy, judge or their settings"


def _batch(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    if len(run) != len(published):
        return BATCH, f"{len(run)} steps in place of {len(published)}: size of the batch, a last window, or epochs"
    return BATCH, f"a window of another size, and {len(run)} steps as published"


def _which_pairs(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    ids = [set(table["pair_ids"]) for table in (run, published)]
    if ids[0] == ids[1]:
        return ORDER, "the same batches in another order: seed or sampling"
    # Of ids alone a digest of each step is kept; the lengths of all responses together tell whether they are others.
    totals = [table[["pairs", "chosen_tokens", "rejected_tokens"]].sum().tolist() for table in (run, published)]
    if totals[0] == totals[1]:
        return ORDER, "pairs of the same number and lengths in all, dealt to other steps: seed or sampling"
    return DATA, "other pairs, whose lengths are others too: source, filters or split"


def _texts(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    return DATA, "pairs of the same ids with other texts: source, labels or chat template"


def _tokens(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    more = run[["chosen_tokens", "rejected_tokens"]].sub(published[["chosen_tokens", "rejected_tokens"]])
    each = more.div(run["pairs"], axis=0).dropna()
    constant = each.iloc[0, 0]
    if constant and (each == constant).all(axis=None):
        return (
            TOKENISATION,
            f"{constant:+.0f} token in every completion, as by one EOS {'more' if constant > 0 else 'less'}",
        )
    capped = run["longest"].max()
    if (more <= 0).all(axis=None) and (more < 0).any(axis=None) and capped < published["longest"].max():
        return TRUNCATION, f"no response is longer than {capped:.0f} tokens, and others are as published"
    return TOKENISATION, "the same texts in other tokens: tokenizer, template or special tokens"


def _reference(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    step = departure.step
    if step > run.index[0]:
        return REFERENCE, f"it is the published one up to step {step - 1} and moves then"
    apart, policy = _apart(run, published, step, "ref_{}_logps"), _apart(run, published, step, "{}_logps")
    if policy <= _ALIKE * 10:
        return REFERENCE, "the policy starts as published, the reference is another"
    if max(apart, policy) < _ROUNDED:
        return PRECISION, f"log-probabilities differ by {max(apart, policy):.2%}, as by rounding: bf16, fp16 or fp32"
    return START, f"policy and reference give other log-probabilities ({policy:.0%} apart) to as many tokens"


def _policy(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    step = departure.step
    if step == run.index[0] and departure.quantities[0] == "loss":  # of a method whose pairs are not recorded
        return LOSS, "before any update: its form, or else data or weights"
    if step == run.index[0]:
        return START, "the reference is as published, and the policy starts elsewhere"
    if len(run) != len(published):
        return SCHEDULE, f"{len(run)} steps in place of {len(published)}, which the learning rate follows"
    lr = _unlike(run, published, "learning_rate")
    if lr is not None:
        return SCHEDULE, f"the learning rate is {lr[1]:.3g} at step {lr[0]}, published {lr[2]:.3g}"
    ratios = [
        run.loc[step, f"{side}_log_ratio"] / published.loc[step, f"{side}_log_ratio"]
        for side in ("chosen", "rejected")
        if abs(published.loc[step, f"{side}_log_ratio"]) > 1e-5
    ]
    if run.loc[step - 1, "pairs"] < run["pairs"].max():
        return BATCH, f"the update of step {step - 1}, whose window is shorter, is another"
    if len(ratios) == 2 and np.isclose(*ratios, rtol=0.1) and abs(np.mean(ratios) - 1.0) > _LONGER:
        return SCHEDULE, f"the first update goes {np.mean(ratios):.2f} times as far, in the same direction"
    return UPDATE, f"the update of step {step - 1} is another, though all before it is as published"


def _gradient(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    if run.loc[departure.step, "pairs"] < run["pairs"].max():
        return BATCH, f"the gradient of step {departure.step}, whose window is shorter, is another"
    return UPDATE, "the loss is as published and its gradient is not: accumulation, clipping or what is differentiated"


def _criterion(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    own, other = (table.loc[departure.step, "decisions"] for table in (run, published))
    if own == other.translate(str.maketrans("+-", "-+")):
        return CRITERION, "every pair decides the other way: the sign of the comparison"
    ties = [text.count("0") / len(text) for text in (own, other)]
    return CRITERION, f"of the same log-probabilities {ties[0]:.0%} of the pairs tie, published {ties[1]:.0%}"


def _pair_beta(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    name = departure.quantities[0]
    own, other = (table.loc[departure.step, name] for table in (run, published))
    if (own - 1.0) * (other - 1.0) < 0.0:
        return RULE, "β̃ moves the other way: the sign of the step"
    sign = 1.0 if name == "relaxed_beta" else -1.0
    return EPSILON, f"ε is {sign * (1.0 / own - 1.0):.4g}, published {sign * (1.0 / other - 1.0):.4g}"


def _rule(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    if departure.quantities[0] == "beta_before" and departure.step == run.index[0]:
        return RULE, f"β starts at {run['beta_before'].iloc[0]:.6g}, published {published['beta_before'].iloc[0]:.6g}"
    own, other = response_of(run).dropna(), response_of(published).dropna()
    if not len(own) or not np.any(own):
        return RULE, "β does not move"
    if np.median(own) * np.median(other) < 0.0:
        return RULE, "β moves the other way: the sign of the step"
    sizes = [_sizes(table) for table in (run, published)]
    if all(np.ptp(size) < 1e-6 * abs(np.median(size)) for size in sizes):
        return EPSILON, f"the step of β is by ε = {np.median(sizes[0]):.4g}, published {np.median(sizes[1]):.4g}"
    return RULE, "of the same decisions another β: how β follows the mean of the steps"


def _loss(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    return LOSS, "of the same log-probabilities and β̃ another loss: its form, smoothing, or which pairs count"


def _rate(run: pd.DataFrame, published: pd.DataFrame, departure: Departure) -> Cause:
    own, other = (table.loc[departure.step, "learning_rate"] for table in (run, published))
    return SCHEDULE, f"the learning rate is {own:.4g}, published {other:.4g}: its peak, warm-up, shape or length"


_OF: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Departure], Cause]] = {
    "pairs": _batch,
    "pair_ids": _which_pairs,
    "texts": _texts,
    **dict.fromkeys(("chosen_tokens", "rejected_tokens", "longest", "token_ids"), _tokens),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), _reference),
    **dict.fromkeys(("chosen_logps", "rejected_logps", "chosen_log_ratio", "rejected_log_ratio", "loss"), _policy),
    **dict.fromkeys(("relaxed", "tightened"), _criterion),
    **dict.fromkeys(("relaxed_beta", "tightened_beta"), _pair_beta),
    **dict.fromkeys(("beta_before", "beta_after"), _rule),
    "loss_residual": _loss,
    "grad_norm": _gradient,
    "learning_rate": _rate,
}


def _sizes(steps: pd.DataFrame) -> pd.Series:
    """ε by β/(1 + ε·mean step), of each step that had one: the same for all, if that is the rule."""
    response = response_of(steps).dropna()
    mean_step = (steps["relaxed"] - steps["tightened"]).loc[response.index]
    return np.expm1(-response * mean_step) / mean_step


def _apart(run: pd.DataFrame, published: pd.DataFrame, step: int, name: str) -> float:
    """The larger relative difference of the two sides at a step."""
    names = [name.format(side) for side in ("chosen", "rejected")]
    own, other = run.loc[step, names].astype(float), published.loc[step, names].astype(float)
    return float(((own - other) / other).abs().max())


def _unlike(run: pd.DataFrame, published: pd.DataFrame, name: str) -> tuple[int, float, float] | None:
    """The first step at which a logged quantity is another: its number, and both values."""
    both = pd.concat([run[name], published[name]], axis=1, keys=["own", "other"]).dropna()
    differs = both[(both["own"] - both["other"]).abs() > _ALIKE * both["other"].abs()]
    return None if differs.empty else (int(differs.index[0]), *map(float, differs.iloc[0]))
