"""Which tasks are measured, with how many examples in the prompt, and which of their scores is the headline.

The names are those of lm-evaluation-harness, which says what a task asks and how it is scored.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task of the harness.

    Attributes:
        name: what the harness calls it.
        label: what a table calls it.
        shots: worked examples in the prompt; None leaves it to the task's own settings.
        score: the share that is shown, as the harness names it; None takes the first of `SHARES` that the task has.
    """

    name: str
    label: str
    shots: int | None = None
    score: str | None = None


# Table 8 states tasks and examples, and not which of a task's scores it shows. These are the ones of the first Open LLM
# Leaderboard, which had the same tasks: for ARC and HellaSwag accuracy normalised by the answers' length, for GSM8K the
# number after "####".
TABLE_8 = (
    Task("mmlu", "MMLU", 5, "acc,none"),
    Task("arc_challenge", "ARC", 25, "acc_norm,none"),
    Task("hellaswag", "HellaSwag", 10, "acc_norm,none"),
    Task("truthfulqa_mc2", "TruthfulQA", 0, "acc,none"),
    Task("winogrande", "Winogrande", 5, "acc,none"),
    Task("gsm8k", "GSM8K", 5, "exact_match,strict-match"),
)

# What can be shown as a percentage of the questions.
SHARES = ("acc_norm", "acc", "exact_match")


def tasks_named(names: list[str]) -> list[Task]:
    """Table 8's tasks as it sets them, others as the harness does; all of Table 8 if no name is given."""
    known = {task.name: task for task in TABLE_8}
    return [known.get(name, Task(name, name)) for name in dict.fromkeys(names)] or list(TABLE_8)


def headline_score(task: Task, scores: dict[str, float]) -> str:
    """The name of the score to show.

    Raises:
        ValueError: if the task has none that is a share.
    """
    shares = [name for share in SHARES for name in scores if name.split(",")[0] == share]
    wanted = shares if task.score is None else [task.score]
    if not wanted or wanted[0] not in scores:
        raise ValueError(
            f"task {task.name!r} has {', '.join(scores) or 'no score'}, and not {task.score or ' or '.join(SHARES)}. "
            "Choose a task that is scored by a share of its questions"
        )
    return wanted[0]
