"""Responses worth reading: the clearest wins and losses, and those on which judgements disagree, side by side in HTML.

All text in them is a model's or a stranger's, and is escaped.
"""

import html

import pandas as pd

from epsdpo.evaluation.judges.counts import BY_ORDER

# Jupyter's own style for tables aligns to the right, under a more specific selector.
_STYLE = (
    "table.responses { border-collapse: collapse; width: 100%; } "
    "table.responses th, table.responses td { border: 1px solid #ccc; padding: 4px 8px; text-align: left !important; "
    "vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; } "
    "table.responses th { white-space: nowrap; } table.responses td:first-child { width: 9em; }"
)
_SHOWN_CHARACTERS = 1500
_DRAW = 1.5


def examples(responses: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows each of the biggest wins, the biggest losses and, from what is left, a random draw.

    The column `chosen_as` says which; ties in preference go by the order of the prompts. Without a judge all are drawn.
    """
    wins, losses = [], []
    if "preference" in responses:
        preference = responses["preference"].dropna()
        ranked = preference.sort_values(ascending=False, kind="stable").index
        wins = [row for row in ranked if preference[row] > _DRAW][:count]
        losses = [row for row in reversed(ranked) if preference[row] < _DRAW][:count]
    rest = responses.drop(index=[*wins, *losses])
    random_rows = rest.sample(n=min(count, len(rest)), random_state=seed).index
    groups = {"biggest win": wins, "biggest loss": losses, "random": random_rows}
    return pd.concat([responses.loc[rows].assign(chosen_as=name) for name, rows in groups.items()], ignore_index=True)


def disagreements(responses: pd.DataFrame, against: str, gold_judges: bool, count: int) -> tuple[str, pd.DataFrame]:
    """`count` judgements to look into, and in words what is odd about them.

    The first of these that there is: the judge against the world's gold reward, the judge against itself in the other
    order, the response that won by the most additional characters.

    Args:
        gold_judges: whether the judge is the gold reward itself.

    Returns:
        A sentence, and the rows with a column `chosen_as`.
    """
    judged = responses.dropna(subset=["preference"])
    margin = judged["preference"] - _DRAW
    plain, switched = (judged[column] - _DRAW for column in (BY_ORDER[False], BY_ORDER[True]))
    if "policy_gold" in judged and against == "reference" and not gold_judges:
        gold = judged["policy_gold"] - judged["reference_gold"]
        sentence = "The judge prefers one response, the gold reward the other; the clearest by reward first."
        oddity = gold.abs().where(margin * gold < 0.0)
    elif (plain.notna() & switched.notna()).any():
        sentence = "The judge changes its mind with the order in which it sees the two; the furthest first."
        oddity = (plain - switched).abs().where(plain * switched < 0.0)
    else:
        sentence = "The longer response won, by the most additional characters first: for its content or its length?"
        longer = judged["policy_response"].str.len() - judged[f"{against}_response"].str.len()
        oddity = longer.abs().where(margin * longer > 0.0)
    rows = oddity.dropna().sort_values(ascending=False, kind="stable").index[:count]
    if not len(rows):
        sentence += " There is none."
    return sentence, judged.loc[rows].assign(chosen_as=[f"{number}" for number in range(1, len(rows) + 1)])


def side_by_side(rows: pd.DataFrame, against: str = "reference") -> str:
    """Rows of `examples` or `disagreements` as an HTML table, long texts cut; `against` names the policy's opponent."""
    header = "".join(f"<th>{name}</th>" for name in ("", "instruction", against, "policy"))
    body = "".join(
        f"<tr><td>{html.escape(row['chosen_as'])}{_verdict(row)}</td><td>{_text(row['instruction'])}</td>"
        f"<td>{_response(row, against)}</td><td>{_response(row, 'policy')}</td></tr>"
        for row in rows.to_dict("records")
    )
    return f"<style>{_STYLE}</style><table class='responses'><tr>{header}</tr>{body}</table>"


def _verdict(row: dict) -> str:
    preference = row.get("preference")
    if preference is None:
        return ""
    said = "not judged" if pd.isna(preference) else f"policy wins with {100.0 * (preference - 1.0):.0f} %"
    orders = [row.get(column) for column in BY_ORDER.values()]
    if not any(pd.isna(value) for value in orders):
        said += " (" + ", ".join(f"{100.0 * (value - 1.0):.0f} %" for value in orders) + " by order)"
    return f"<br><small>{said}</small>"


def _response(row: dict, side: str) -> str:
    cut = "" if row.get(f"{side}_finished", True) else " <i>(cut at max_new_tokens)</i>"
    text = row[f"{side}_response"]
    gold = row.get(f"{side}_gold")
    measure = f"{len(text)} characters" if gold is None else f"gold reward {gold:.2f}"
    return f"{_text(text) or '<i>(empty)</i>'}{cut}<br><small>{measure}</small>"


def _text(text: str) -> str:
    rest = len(text) - _SHOWN_CHARACTERS
    more = f"<i> … {rest} more characters</i>" if rest > 0 else ""
    return html.escape(text[:_SHOWN_CHARACTERS]) + more
