"""What a notebook shows of an evaluation beside its figures: the headline, tasks, positions and lengths in tables."""

import html
from typing import Any

import pandas as pd

from epsdpo.evaluation.judges.counts import BY_ORDER, completeness
from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.evaluation.scores.numbers import LENGTH_ONLY

OPPONENTS = {"reference": "the model it started from", "given": "the responses given with the prompts"}
_LENGTH_GROUPS = 5


def judged_or_not(summary: dict[str, Any]) -> str:
    """HTML: the sentence at the head of a report, whether every comparison was judged."""
    if summary["judge"] is None:
        return "<p><b>No judge was asked for:</b> responses, lengths and divergences are what was measured.</p>"
    style = " style='color: #D55E00'" if summary["n_failed"] else ""
    return f"<p><b{style}>{html.escape(completeness(summary))}</b></p>"


def why_no_win_rate(summary: dict[str, Any]) -> str:
    """In a sentence, for a summary without one."""
    if summary["judge"] is None:
        return "No win rate: no judge was asked for (`judge: null`)."
    return "No win rate: fewer than two comparisons were judged."


def what_was_asked(summary: dict[str, Any]) -> str:
    """HTML: how many prompts of which source were answered, who judged and when, and how long answers are."""
    prompts = summary["prompts"]
    n_distinct = summary.get("n_distinct", summary["n_total"])
    different = f", {n_distinct} distinct," if n_distinct < summary["n_total"] else ""
    sentences = [
        f"{summary['n_total']} prompts{different} of {prompts['source']}, each starting with "
        f"{prompts['bos_per_prompt']} BOS."
    ]
    sentences += [f"{entry['rows']} rows were left out: {entry['meaning']}." for entry in prompts["left_out"].values()]
    if not_used := [name for name, count in prompts.get("not_used", {}).items() if count]:
        sentences.append(f"Columns that were not used: {', '.join(not_used)}.")
    if prompts["duplicates"]:
        sentences.append(f"{prompts['duplicates']} prompts repeat an earlier one.")
    if different:
        sentences.append("Intervals resample the distinct ones, which are told by the first user turn.")
    if summary["judge"] is not None:
        sentences += _who_judged(summary)
    sentences.append(
        f"Responses have {summary['policy_avg_length']} characters on average, the reference's "
        f"{summary['reference_avg_length']}."
    )
    return f"<p>{html.escape(' '.join(sentences))}</p>"


def _who_judged(summary: dict[str, Any]) -> list[str]:
    sentences = [f"Judge: {summary['judge']}, against {OPPONENTS[summary['against']]}."]
    if summary["judged_from"] is not None:
        when = " to ".join(dict.fromkeys((summary["judged_from"], summary["judged_until"])))
        sentences.append(f"Judged {when}.")
    if summary["served_models"].keys() - {"not stated"}:
        served = ", ".join(f"{name} ({count})" for name, count in summary["served_models"].items())
        sentences.append(f"Models as the server named them: {served}.")
    if summary["n_identical"]:
        sentences.append(f"{summary['n_identical']} pairs of identical responses are draws and were not shown to it.")
    if summary["n_cut"]:
        sentences.append(f"{summary['n_cut']} answers are on texts that had to be cut to fit its context.")
    if summary["judge_cost"] is not None:
        sentences.append(
            f"They cost {summary['judge_cost']:.2f} in the currency of the prices, for {summary['prompt_tokens']} "
            f"prompt and {summary['completion_tokens']} completion tokens."
        )
    if summary["n_annotations"] < summary["n_total"]:
        sentences.append("annotations.json holds each instruction once.")
    if "win_rate" in summary:
        sentences.append(f"Standard error of the win rate: {summary['standard_error']:.1f} points.")
    if "length_control_missing" in summary:
        sentences.append(
            f"There is no length-controlled win rate as AlpacaEval 2 has it: {summary['length_control_missing']}."
        )
    if summary.get("length_control", "").startswith("none: "):
        reason = summary["length_control"].removeprefix("none: ")
        sentences.append(f"There is no length-controlled win rate: {reason}.")
    return sentences


def headline(summary: dict[str, Any]) -> pd.DataFrame:
    """The numbers that answer "is the policy better, and how far has it moved?", as text with 95 % intervals.

    Those of a judge are left out where there was none.
    """
    control = summary.get("length_control", LENGTH_ONLY)
    measures = {
        "win rate (%)": ("win_rate", 1.0, ".1f"),
        # Beside AlpacaEval's own; elsewhere the next entry is the length-only one, and takes its place.
        f"length-controlled win rate, {LENGTH_ONLY} (%)": ("length_only_win_rate", 1.0, ".1f"),
        f"length-controlled win rate, {control} (%)": ("length_controlled_win_rate", 1.0, ".1f"),
        "KL(π‖π_ref) per response (nats)": ("reverse_kl_per_response", 1.0, ".3f"),
        "KL(π‖π_ref) per token (nats)": ("reverse_kl_per_token", 1.0, ".4f"),
        "KL(π_ref‖π) per response (nats)": ("forward_kl_per_response", 1.0, ".3f"),
        "KL(π_ref‖π) per token (nats)": ("forward_kl_per_token", 1.0, ".4f"),
        "mean gold reward, policy": ("policy_gold", 1.0, ".3f"),
        "mean gold reward, reference": ("reference_gold", 1.0, ".3f"),
        "every rule followed, policy (%)": ("policy_correct", 100.0, ".1f"),
        "every rule followed, reference (%)": ("reference_correct", 100.0, ".1f"),
    }
    rows = {}
    for label, (key, scale, form) in measures.items():
        if key not in summary:
            continue
        value, low, high = (format(scale * summary[key + end], form) for end in ("", "_low", "_high"))
        rows[label] = {"value": value, "95 % interval": f"{low} to {high}"}
    return pd.DataFrame.from_dict(rows, orient="index")


def win_rate_table(summary: dict[str, Any]) -> pd.DataFrame:
    """Raw and, where there is one, length-controlled win rate for a figure: columns label, win_rate, low, high
    (percent)."""
    measures = {"win_rate": "raw", "length_controlled_win_rate": f"length-controlled\n({summary['length_control']})"}
    return pd.DataFrame(
        [
            {"label": label, "win_rate": summary[key], "low": summary[f"{key}_low"], "high": summary[f"{key}_high"]}
            for key, label in measures.items()
            if key in summary
        ]
    )


def by_task(responses: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """One row per task: judged prompts, how many of them are distinct, win rate with its interval (percent), tokens,
    and gold rewards where known."""
    rows = []
    for task, members in responses.dropna(subset=["preference"]).groupby("task"):
        row = {"task": task or "not stated", "prompts": len(members), "distinct": distinct(members["instruction"])}
        row |= _rate(members, "preference", samples, seed)
        for measure in ("gold", "tokens"):
            if f"policy_{measure}" in members:
                row |= {f"{measure}, {side}": members[f"{side}_{measure}"].mean() for side in ("policy", "reference")}
        rows.append(row)
    return pd.DataFrame(rows).rename(columns={"win_rate": "win rate (%)"}).set_index("task")


def by_position(responses: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame | None:
    """The policy's win rate (percent) by which response the judge saw first, for a figure.

    A judge without a preference for a position has the same rate twice. Where it saw each pair in both orders, both
    rows are about the same prompts; where in one, about different ones, and their distance is partly chance.

    Returns:
        Columns label, answers, win_rate, low, high; None where not both positions were shown.
    """
    judged = responses.dropna(subset=["preference"])
    labels = {False: "the other response first", True: "the policy's response first"}
    rows = [
        {"label": labels[switched], "answers": len(answers), **_rate(answers, column, samples, seed)}
        for switched, column in BY_ORDER.items()
        if len(answers := judged.dropna(subset=[column]))
    ]
    return pd.DataFrame(rows) if len(rows) == 2 else None


def position_sentence(summary: dict[str, Any]) -> str:
    """HTML: how much the judge minds the order, where it saw both.

    Args:
        summary: of the responses, or of the published judgements that it repeated.
    """
    if not summary["n_both_orders"]:
        return (
            "<p>Each pair was shown in one order, which its instruction decides; the two rates are about different "
            "prompts. <code>judge.order: both</code> separates the judge's taste for a position from them.</p>"
        )
    return (
        f"<p>Over {summary['n_both_orders']} pairs shown in both orders, the response shown first won "
        f"{summary['position_bias']:+.1f} points more often than half of the time; "
        f"{100.0 * summary['position_consistency']:.0f} % of the pairs got the same winner in both.</p>"
    )


def by_length_difference(responses: pd.DataFrame, against: str, samples: int, seed: int) -> pd.DataFrame:
    """Win rate by how much longer the policy's response is, in up to five groups of about as many prompts.

    Returns:
        Columns difference (mean of the group, in characters), prompts, win_rate, low, high (percent).
    """
    judged = responses.dropna(subset=["preference"])
    difference = judged["policy_response"].str.len() - judged[f"{against}_response"].str.len()
    groups = pd.qcut(difference, min(_LENGTH_GROUPS, len(judged)), duplicates="drop", labels=False)
    # Where all differ by the same there is one group, which qcut cannot cut.
    groups = groups.fillna(0)
    rows = [
        {
            "difference": difference[members.index].mean(),
            "prompts": len(members),
            **_rate(members, "preference", samples, seed),
        }
        for _, members in judged.groupby(groups)
    ]
    return pd.DataFrame(rows)


def win_rate_and_kl(summary: dict[str, Any]) -> pd.DataFrame:
    """This run for the figure of win rate over KL, and the reference, which is even with itself at no divergence.

    Beside responses given with the prompts the reference has no point: it was not compared with them.
    """
    names = ("win_rate", "reverse_kl_per_response", "forward_kl_per_response")
    keys = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    rows = [{"title": summary["title"], **{key: summary[key] for key in keys}}]
    if summary["against"] == "reference":
        reference = {key: 50.0 if key.startswith("win_rate") else 0.0 for key in keys}
        rows.insert(0, {"title": "the model it started from", **reference})
    return pd.DataFrame(rows)


def _rate(responses: pd.DataFrame, column: str, samples: int, seed: int) -> dict[str, float]:
    """The mean of a column of preferences in percent, and its interval."""
    wins = 100.0 * (responses[column] - 1.0)
    interval = bootstrap_interval(wins, samples, seed, prompts=responses["instruction"])
    return {"win_rate": wins.mean(), "low": interval.low, "high": interval.high}
