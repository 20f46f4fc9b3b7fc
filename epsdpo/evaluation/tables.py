"""What a notebook shows of an evaluation beside its figures: the headline, the tasks, responses side by side.

This module knows how numbers become tables for people. It makes no measurement of its own that
`epsdpo.evaluation.winrate` does not offer.
"""

import html
from typing import Any

import pandas as pd

from epsdpo.evaluation.winrate import bootstrap_interval

# Jupyter's own style for tables aligns to the right, under a more specific selector.
_EXAMPLES_STYLE = (
    "table.responses { border-collapse: collapse; width: 100%; } "
    "table.responses th, table.responses td { border: 1px solid #ccc; padding: 4px 8px; text-align: left !important; "
    "vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }"
)


def what_was_asked(summary: dict[str, Any]) -> str:
    """HTML: how many prompts of which source were answered and judged, what was left out, and how long answers are."""
    prompts = summary["prompts"]
    sentences = [
        f"{summary['n_total']} prompts of {prompts['source']}, each starting with {prompts['bos_per_prompt']} BOS."
    ]
    sentences += [f"{entry['rows']} rows were left out: {entry['meaning']}." for entry in prompts["left_out"].values()]
    if prompts["duplicates"]:
        sentences.append(f"{prompts['duplicates']} prompts repeat an earlier one.")
    if summary["judge"] is None:
        sentences.append("There is no judge for them.")
    else:
        sentences.append(
            f"{summary['n_scored']} were judged, by {summary['judge']}. Standard error of the win rate: "
            f"{summary['standard_error']:.1f} points."
        )
    sentences.append(
        f"Responses have {summary['policy_avg_length']} characters on average, the reference's "
        f"{summary['reference_avg_length']}."
    )
    return f"<p>{html.escape(' '.join(sentences))}</p>"


def headline(summary: dict[str, Any]) -> pd.DataFrame:
    """The numbers that answer "is the policy better, and how far has it moved?", as text with 95 % intervals.

    Those of a judge are left out where there was none.
    """
    measures = {
        "win rate (%)": ("win_rate", 1.0, ".1f"),
        "length-controlled win rate, length-only (%)": ("length_controlled_win_rate", 1.0, ".1f"),
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
    """Raw and length-controlled win rate for `epsdpo.plots`: columns label, win_rate, low, high (percent)."""
    measures = {"win_rate": "raw", "length_controlled_win_rate": "length-controlled\n(length-only)"}
    return pd.DataFrame(
        [
            {"label": label, "win_rate": summary[key], "low": summary[f"{key}_low"], "high": summary[f"{key}_high"]}
            for key, label in measures.items()
        ]
    )


def by_task(responses: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """One row per task: prompts, win rate with its interval (percent), mean gold reward and tokens of both sides."""
    rows = []
    for task, members in responses.groupby("task"):
        wins = 100.0 * (members["preference"] - 1.0)
        interval = bootstrap_interval(wins, samples, seed)
        rows.append(
            {
                "task": task,
                "prompts": len(members),
                "win rate (%)": wins.mean(),
                "low": interval.low,
                "high": interval.high,
                "gold, policy": members["policy_gold"].mean(),
                "gold, reference": members["reference_gold"].mean(),
                "tokens, policy": members["policy_tokens"].mean(),
                "tokens, reference": members["reference_tokens"].mean(),
            }
        )
    return pd.DataFrame(rows).set_index("task")


def examples(responses: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows each of the biggest wins, the biggest losses and, from what is left, a random draw.

    The column `chosen_as` says which; ties in gold difference go by the order of the prompts.
    """
    difference = responses["policy_gold"] - responses["reference_gold"]
    ranked = difference.sort_values(ascending=False, kind="stable").index
    wins = [row for row in ranked if difference[row] > 0][:count]
    losses = [row for row in reversed(ranked) if difference[row] < 0][:count]
    rest = responses.drop(index=[*wins, *losses])
    random_rows = rest.sample(n=min(count, len(rest)), random_state=seed).index
    groups = {"biggest win": wins, "biggest loss": losses, "random": random_rows}
    return pd.concat([responses.loc[rows].assign(chosen_as=name) for name, rows in groups.items()], ignore_index=True)


def side_by_side(rows: pd.DataFrame) -> str:
    """Rows of `examples` as an HTML table; instruction and responses are escaped, since a model wrote them."""
    header = "".join(f"<th>{name}</th>" for name in ("", "instruction", "reference", "policy"))
    body = "".join(
        f"<tr><td>{html.escape(row.chosen_as)}</td><td>{html.escape(row.instruction)}</td>"
        f"<td>{_response(row.reference_response, row.reference_gold, row.reference_finished)}</td>"
        f"<td>{_response(row.policy_response, row.policy_gold, row.policy_finished)}</td></tr>"
        for row in rows.itertuples()
    )
    return f"<style>{_EXAMPLES_STYLE}</style><table class='responses'><tr>{header}</tr>{body}</table>"


def _response(text: str, gold: float, finished: bool) -> str:
    cut = "" if finished else " <i>(cut at max_new_tokens)</i>"
    return f"{html.escape(text) or '<i>(empty)</i>'}{cut}<br><small>gold reward {gold:.2f}</small>"
