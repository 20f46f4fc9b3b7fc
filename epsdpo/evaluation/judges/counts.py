"""What judgements come to besides a win rate: whether all were made, and how much the judge minds the order."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from epsdpo.evaluation.judges.answers import remedies_for
from epsdpo.evaluation.judges.comparison import Comparison, Judgement
from epsdpo.evaluation.judges.cost import tokens_used

# The columns of preferences by what was shown first; a judge that sees no order counts as the first.
BY_ORDER = {False: "preference_opponent_first", True: "preference_policy_first"}


def summarise(judgements: list[Judgement]) -> dict[str, Any]:
    """Counts and order effects, ready for JSON.

    The keys: n_total, n_scored, n_failed; failures, their reasons with counts; n_identical, draws without asking;
    position_bias, how much likelier than 1/2 the output shown first wins, in points, over all answers of comparisons
    judged in both orders; position_consistency, the share of those whose two answers prefer the same output;
    n_both_orders, how many those are; n_cut, answers for which the judge's model had to cut a text; served_models with
    counts; judged_from and judged_until; prompt_tokens and completion_tokens as servers counted them.
    """
    failed = [judgement.failure.reason for judgement in judgements if judgement.failure is not None]
    # A request that several comparisons share was made once.
    records = list({record["key"]: record for item in judgements for record in item.records.values()}.values())
    times = sorted(record["time"] for record in records)
    return {
        "n_total": len(judgements),
        "n_scored": sum(judgement.preference is not None for judgement in judgements),
        "n_failed": len(failed),
        "failures": dict(Counter(failed).most_common()),
        "n_identical": sum(judgement.failure is None and not judgement.records for judgement in judgements),
        **_order_effects(judgements),
        "n_cut": sum(bool(record["answer"].get("cut")) for record in records),
        "served_models": dict(Counter(record["served_model"] or "not stated" for record in records)),
        "judged_from": times[0] if times else None,
        "judged_until": times[-1] if times else None,
        **tokens_used(records),
    }


def completeness(summary: dict[str, Any]) -> str:
    """The sentence that belongs at the head of a report."""
    if summary["n_failed"] == 0:
        return f"All {summary['n_total']} comparisons were judged."
    reasons = ", ".join(f"{reason}: {count}" for reason, count in summary["failures"].items())
    remedies = "".join(f" {remedy}." for remedy in remedies_for(summary["failures"]))
    return (
        f"INCOMPLETE: {summary['n_failed']} of {summary['n_total']} comparisons were not judged ({reasons}). They are "
        f"in no number below. The same command asks for them again.{remedies}"
    )


def annotations(
    comparisons: list[Comparison],
    judgements: list[Judgement],
    judge_name: str,
    model_name: str,
    reference_name: str = "reference",
) -> list[dict[str, Any]]:
    """Rows in the format of AlpacaEval's `annotations.json`, in the order given; a failed preference is null."""
    return [
        {
            "instruction": comparison.instruction,
            "output_1": comparison.reference_output,
            "generator_1": reference_name,
            "output_2": comparison.model_output,
            "generator_2": model_name,
            "annotator": judge_name,
            "preference": judgement.preference,
            "raw_completion": [record["answer"] for record in judgement.records.values()],
        }
        for comparison, judgement in zip(comparisons, judgements, strict=True)
    ]


@dataclass(frozen=True)
class BothOrders:
    """A comparison that was judged in both orders.

    Attributes:
        number: its place among the judgements.
        first_wins: mean chance of the output that was shown first.
        consistent: whether both answers prefer the same output.
    """

    number: int
    first_wins: float
    consistent: bool


def in_both_orders(judgements: list[Judgement]) -> list[BothOrders]:
    """Those of the comparisons that the judge saw in both orders and answered for."""
    found = []
    for number, judgement in enumerate(judgements):
        if judgement.records.keys() == {False, True}:
            plain, switched = (judgement.records[order]["preference"] for order in (False, True))
            # Shown first: the reference where not switched (it wins with 2 - p), the model where switched (p - 1).
            first_wins = (2.0 - plain + switched - 1.0) / 2.0
            consistent = (plain - 1.5) * (switched - 1.5) > 0.0 or plain == switched
            found.append(BothOrders(number, first_wins, consistent))
    return found


def _order_effects(judgements: list[Judgement]) -> dict[str, Any]:
    found = in_both_orders(judgements)
    if not found:
        return {"n_both_orders": 0, "position_bias": None, "position_consistency": None}
    return {
        "n_both_orders": len(found),
        "position_bias": 100.0 * (sum(item.first_wins for item in found) / len(found) - 0.5),
        "position_consistency": sum(item.consistent for item in found) / len(found),
    }
