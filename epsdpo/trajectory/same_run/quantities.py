"""What of a run is held against the published one: its numbers step by step, its evaluation, and where it ran.

A step's numbers are in the order in which one comes of another, so that the first that differs is nearest to the cause.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.special import log_expit

from epsdpo.experiment.values import flatten
from epsdpo.files import read_object
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.runs.layout import RESPONSES, SUMMARY, experiment_of, prepared_of
from epsdpo.runs.manifest import commit_of, read_manifest
from epsdpo.trajectory.trl_logs import find_log

# Column -> what messages call it. Those of the first kind are the same or not, of the second they have intervals.
EXACT = {
    "pairs": "number of pairs",
    "pair_ids": "which pairs",
    "texts": "texts of the pairs",
    "chosen_tokens": "tokens of the chosen responses",
    "rejected_tokens": "tokens of the rejected responses",
    "longest": "tokens of the longest response",
    "token_ids": "token ids",
}
MEASURED = {
    "ref_chosen_logps": "log-probability of the chosen responses under the reference (nats)",
    "ref_rejected_logps": "log-probability of the rejected responses under the reference (nats)",
    "chosen_logps": "log-probability of the chosen responses (nats)",
    "rejected_logps": "log-probability of the rejected responses (nats)",
    "chosen_log_ratio": "log-ratio of the chosen responses (nats)",
    "rejected_log_ratio": "log-ratio of the rejected responses (nats)",
    "beta_before": "β",
    "relaxed": "share of relaxed pairs",
    "tightened": "share of tightened pairs",
    "relaxed_beta": "β̃ of relaxed pairs over β",
    "tightened_beta": "β̃ of tightened pairs over β",
    "loss_residual": "loss less that of sigmoid DPO at the same margins",
    "loss": "loss",
    "beta_after": "β after the step",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}
WORDS = EXACT | MEASURED
KNOWN_BY_DATA = ("texts", "token_ids")  # "" of a run whose prepared data are not there any more
_MADE_BY = ("packages", "python", "platform", "cpus", "gpus", "processor", "environment", "seeds", "finished")
_NO_MEASURE = re.compile("n_.*|.*_(low|high|seconds)|seed|(prompt|completion)_tokens|standard_error")


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of one run.

    Attributes:
        experiment: its name.
        steps: a row per optimiser step, by its number: `WORDS`, `decisions` ("-", "0" or "+" for each pair by its id),
            and `bits`, a digest of every number that was recorded of the step. NaN and "" where nothing says it.
        settings: of its config, at dotted names.
        made: by which code, libraries and machine, with which seeds.
        summary: the measures of its evaluation; none without one.
        answers: digest of the reference's answer to each prompt, in their order.
    """

    experiment: str
    steps: pd.DataFrame
    settings: dict[str, Any]
    made: dict[str, Any]
    summary: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)

    def seed(self) -> int | None:
        return self.settings.get("seed")

    def has_data_of(self, other: "RunNumbers") -> bool:
        """Whether each step saw the same pairs; not, where no record says which pairs it saw."""
        return bool((self.steps["pair_ids"] != "").all()) and self.may_have_data_of(other)

    def may_have_data_of(self, other: "RunNumbers") -> bool:
        """Whether each step saw the same pairs, as far as ids, lengths and, where both have them, token ids say."""
        if len(self.steps) != len(other.steps):
            return False
        same = {name: self.steps[name] == other.steps[name] for name in EXACT}
        for name in KNOWN_BY_DATA:
            same[name] |= (self.steps[name] == "") | (other.steps[name] == "")
        return all(column.all() for column in same.values())

    def as_text(self) -> str:
        columns = {name: [None if value != value else value for value in self.steps[name]] for name in self.steps}
        return json.dumps({**asdict(self), "steps": {"step": list(self.steps.index), **columns}}, ensure_ascii=False)

    @classmethod
    def of_text(cls, text: str) -> "RunNumbers":
        content = json.loads(text)
        steps = pd.DataFrame(content.pop("steps")).set_index("step")
        return cls(**content, steps=steps.astype(dict.fromkeys(MEASURED, float)))


def training_in(run: Path) -> Path:
    return run / "train" if (run / "train").is_dir() else run


def numbers_of(run: Path) -> RunNumbers:
    """The numbers of the run in the folder of an experiment, which has those of its stages, or of a training.

    Raises:
        DamagedRecord: if its record is not what was written.
    """
    train_dir = training_in(run)
    steps = read_steps(train_dir).set_index("step", drop=False)
    experiment, manifest = experiment_of(train_dir), read_manifest(train_dir) or {}
    made = {"commit": commit_of(manifest)} | {name: manifest[name] for name in _MADE_BY if name in manifest}
    return RunNumbers(
        experiment.name,
        _by_step(steps, read_pairs(train_dir), _texts_of(train_dir), _logged(train_dir)),
        flatten(experiment.model_dump()),
        made,
        _measures(train_dir.parent / "evaluate" / SUMMARY),
        _answers(train_dir.parent / "evaluate" / RESPONSES),
    )


def _by_step(
    steps: pd.DataFrame, pairs: pd.DataFrame, texts: dict[str, dict[str, str]], logged: pd.DataFrame
) -> pd.DataFrame:
    recorded = list(pairs.select_dtypes("number"))
    pairs = pairs.sort_values(["step", "pair_id"])
    for name, digests in texts.items():
        pairs[name] = [digests.get(pair_id, "") for pair_id in pairs["pair_id"]]
    table = steps[[name for name in MEASURED if name in steps]].copy()
    table["pairs"] = steps["pairs_seen"].diff().fillna(steps["pairs_seen"].iloc[0]).astype(int)
    ratio = pairs["beta"] / pairs["step"].map(steps["beta_before"])
    pairs = pairs.assign(
        longest=pairs[["chosen_tokens", "rejected_tokens"]].max(axis=1),
        relaxed_beta=ratio.where(pairs["decision"] == 1),
        tightened_beta=ratio.where(pairs["decision"] == -1),
        decisions=pairs["decision"].map({-1: "-", 0: "0", 1: "+"}),
    )
    # −log σ(β̃·margin), where β̃ is known of the pair.
    pairs["sigmoid_loss"] = -log_expit(pairs["reward_margin"])
    by = pairs.groupby("step")
    for name in [name for name in MEASURED if name in pairs]:
        table[name] = by[name].mean()
    table["loss_residual"] = table["loss"] - by["sigmoid_loss"].mean()
    for name, how in (("chosen_tokens", "sum"), ("rejected_tokens", "sum"), ("longest", "max"), ("decisions", "sum")):
        table[name] = by[name].agg(how)
    for name, column in (("pair_ids", "pair_id"), ("texts", "texts"), ("token_ids", "token_ids")):
        table[name] = by[column].agg(lambda values: _digest(values) if all(values) else "")
    table = table.join(logged)
    of_steps, groups = steps.drop(columns="seconds"), dict(iter(by))
    table["bits"] = [
        _digest([_bytes(of_steps.loc[step]), _bytes(groups[step][recorded]) if step in groups else ""])
        for step in table.index
    ]
    names = ["pair_ids", *KNOWN_BY_DATA, "decisions"]
    table[names] = table[names].astype(object).fillna("")
    counts = ["chosen_tokens", "rejected_tokens", "longest"]
    table[counts] = table[counts].fillna(0).astype(int)
    return table.reindex(columns=[*WORDS, "decisions", "bits"])


def _texts_of(train_dir: Path) -> dict[str, dict[str, str]]:
    """Digests of each pair's texts and of its token ids, by its id, where the prepared data are still there."""
    path = prepared_of(train_dir)
    if path is None:
        return dict.fromkeys(KNOWN_BY_DATA, {})
    data = pq.read_table(path).to_pandas()
    parts = ("prompt", "chosen", "rejected")
    texts = zip(*(data[part] for part in parts), strict=True)
    ids = zip(*(data[f"{part}_ids"] for part in parts), strict=True)
    digests = ([_digest(row) for row in texts], [_digest(map(list, row)) for row in ids])
    return {
        name: dict(zip(data["pair_id"], values, strict=True))
        for name, values in zip(KNOWN_BY_DATA, digests, strict=True)
    }


def _logged(train_dir: Path) -> pd.DataFrame:
    """What the trainer's own log has of some steps, if it left one."""
    log = find_log(train_dir)
    rows = (read_object(log) or {}).get("log_history", []) if log else []
    found = {row["step"]: [row.get(name) for name in ("grad_norm", "learning_rate")] for row in rows if "loss" in row}
    return pd.DataFrame.from_dict(found, orient="index", columns=["grad_norm", "learning_rate"], dtype=float)


def _measures(path: Path) -> dict[str, float]:
    summary = read_object(path) or {}
    return {
        name: float(value)
        for name, value in summary.items()
        if type(value) in (int, float) and not _NO_MEASURE.fullmatch(name)
    }


def _answers(path: Path) -> list[str]:
    if not path.is_file() or "reference_response" not in pq.read_schema(path).names:
        return []
    answers = pd.read_parquet(path, columns=["prompt_id", "reference_response"]).sort_values("prompt_id")
    return [_digest([text])[:8] for text in answers["reference_response"]]


def _bytes(numbers: pd.Series | pd.DataFrame) -> bytes:
    return np.ascontiguousarray(numbers.to_numpy(float)).tobytes()


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode()).hexdigest()[:16]
