"""Comparisons of numbers, and a judge behind HTTP that prefers the bigger one."""

import json
import math

import pytest

from epsdpo.evaluation.judges.ask import JUDGEMENTS, judge_comparisons
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import Comparison
from epsdpo.experiment.sections.judge import JudgeSection
from kit.chat_server import completion, outputs


def comparisons(count):
    """Outputs are numbers, the reference's 5 each time; no two are equal."""
    return [Comparison(f"instruction {row}", "5.0", f"{row % 9}.5") for row in range(count)]


def second_wins(first, second):
    return 1.0 / (1.0 + math.exp(float(first) - float(second)))


def expected(comparison):
    """The bigger number is better, in whatever order it is shown."""
    return 1.0 + second_wins(comparison.reference_output, comparison.model_output)


def good(body, before=0):
    """Log-probabilities by `second_wins`, as a server gives them, and the text that goes with them."""
    chance = second_wins(*outputs(body))
    top = [("M", math.log(chance)), ("m", math.log1p(-chance)), ("The", -9.0)]
    return completion("M" if chance > 0.5 else "m", top)


def settings_for(server, **changes):
    values = {
        "kind": "chat",
        "model": "judge",
        "base_url": server.url,
        "concurrency": 4,
        "timeout_seconds": 20.0,
        "backoff_seconds": 0.01,
        "max_retries": 3,
    }
    return JudgeSection(**values | changes)


def judge_all(items, server, folder, **changes):
    return judge_comparisons(items, ChatJudge(settings_for(server, **changes)), folder)


def lines(folder, name=JUDGEMENTS):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def assert_right(judgements, items):
    assert [item.preference for item in judgements] == pytest.approx([expected(item) for item in items])
