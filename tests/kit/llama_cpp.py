"""What llama.cpp's server was asked: of itself, and again of its recorded answers. tests/data/llama_cpp/README.md has
the servers.

    python -m kit.llama_cpp PLAIN SMALL LOADING

asks the three servers all of it, and writes what the kit made of their answers to live.json.
"""

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from epsdpo.evaluation.judges.ask import judge_comparisons
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import Comparison, Judgement
from epsdpo.experiment import EvaluateSection, ServerSection
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.response import Response
from epsdpo.models.server import ServerEngine
from kit.official import OFFICIAL

FOLDER = Path(__file__).parents[1] / "data" / "llama_cpp"
ANSWERS, LIVE = FOLDER / "answers.jsonl.gz", FOLDER / "live.json"
NAME = "SmolLM2"  # as which the plain server serves it
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # as which one without --alias does
KEY_VARIABLE, KEY = "EPSDPO_TEST_KEY", "sk-of-the-small-server"

PUBLISHED = json.loads(gzip.decompress((FOLDER.parent / "alpaca_eval_judge.json.gz").read_bytes()))["comparisons"]
COMPARISONS = [Comparison(row["instruction"], row["output_1"], row["output_2"]) for row in PUBLISHED]
TOO_LONG = Comparison("Which is longer?", "word " * 9000, "word")
WHILE_LOADING = Comparison("Name a colour.", "Blue.", "Seven.")
WITH_WRONG_KEY = Comparison("Name a fruit.", "Grey.", "Apple.")
PROMPTS = [RenderedPrompt(**prompt) for prompt in json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))]
QUESTIONS, NO_ROOM, LITTLE_ROOM = PROMPTS[:6], PROMPTS[6], PROMPTS[7]


def judge_settings(url: str, **changes: Any) -> JudgeSection:
    """Both orders, with the template that has examples."""
    values = {
        "kind": "chat",
        "model": NAME,
        "base_url": url,
        "order": "both",
        "template": str(FOLDER / "judge_template.txt"),
        "concurrency": 2,
        "timeout_seconds": 600.0,
        "backoff_seconds": 0.05,
        "max_retries": 9,
    }
    return JudgeSection(**values | changes)


def judge(url: str, comparisons: list[Comparison], folder: Path | None = None, **changes: Any) -> list[Judgement]:
    return judge_comparisons(comparisons, ChatJudge(judge_settings(url, **changes)), folder)


def respond(
    url: str, prompts: list[RenderedPrompt], tokens: int = 24, model: str = NAME, **changes: Any
) -> list[Response]:
    server = ServerSection(base_url=url, policy=model, reference="other", concurrency=2, **changes)
    settings = EvaluateSection(engine="server", server=server, max_new_tokens=tokens)
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    engine, found = ServerEngine(server, model, tokenizer, settings, 42, {}), {}
    for outcome in engine.answers(prompts, [True] * len(prompts)):
        found |= outcome
    return [found[number] for number in range(len(prompts))]


def everything(plain: str, small: str, loading: str) -> dict[str, Any]:
    """What the kit makes of all answers; of refusals, what it says, with "SERVER" for an address."""

    def said(ask: Callable[[], list[Judgement] | list[Response]]) -> Any:
        try:
            return [
                [item.text, item.finished] if isinstance(item, Response) else item.preference or str(item.failure)
                for item in ask()
            ]
        except RuntimeError as error:  # those of judges and engines
            return re.sub("http://[^ ]*", "SERVER", str(error))

    found: dict[str, Any] = {"loading": said(lambda: judge(loading, [WHILE_LOADING]))}
    for mode in ("logprobs", "text"):
        found[mode] = said(lambda mode=mode: judge(plain, COMPARISONS, mode=mode))
    with tempfile.TemporaryDirectory() as folder:
        found["default template"] = said(
            lambda: judge(plain, COMPARISONS[:10], Path(folder), template=None, concurrency=1)
        )
    found["too long"] = said(lambda: judge(plain, [TOO_LONG]))
    found["completions"] = said(lambda: respond(plain, QUESTIONS))
    found["chat"] = said(lambda: respond(plain, QUESTIONS, endpoint="chat"))
    found["cut"] = said(lambda: respond(plain, QUESTIONS, tokens=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "sk-another")
        found["wrong key"] = said(lambda: respond(small, QUESTIONS[:1], 4, FILE, api_key_env=KEY_VARIABLE))
        found["wrong key, judge"] = said(lambda: judge(small, [WITH_WRONG_KEY], api_key_env=KEY_VARIABLE))
        patch.setenv(KEY_VARIABLE, KEY)
        found["right key"] = said(lambda: respond(small, QUESTIONS[1:2], 4, FILE, api_key_env=KEY_VARIABLE))
        found["other name"] = said(lambda: respond(small, QUESTIONS[2:3], 4, api_key_env=KEY_VARIABLE))
        found["no room"] = said(lambda: respond(small, [NO_ROOM], 4, FILE, api_key_env=KEY_VARIABLE))
        found["little room"] = said(lambda: respond(small, [LITTLE_ROOM], 300, FILE, api_key_env=KEY_VARIABLE))
    return found


if __name__ == "__main__":
    LIVE.write_text(json.dumps(everything(*sys.argv[1:]), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
