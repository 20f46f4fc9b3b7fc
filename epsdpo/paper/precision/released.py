"""What the released code decided under each way of launching it, and the models and pairs that it was given.

They lie in the repository's tests/data/regimes; tests/data/README.md says how they were made.
"""

import json
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from epsdpo.evaluation.scores.intervals import share_interval
from epsdpo.files import read_text
from epsdpo.methods.heads import expose_hidden_states
from epsdpo.methods.loading import load_causal_lm
from epsdpo.trajectory.summary import DECISIONS

MAX_LENGTH = 1024  # tokens, as in the runs

# Record of a launch -> what it was, and the arithmetic of its criterion by the name of `criterion_dtype`.
LAUNCHES = {
    "R1_zero3_1proc": ("DeepSpeed ZeRO-3, bf16 (published)", "bfloat16"),
    "R1_zero3_2proc": ("the same, 2 processes", "bfloat16"),
    "R6_single_pure_bf16": ("1 process, bfloat16 weights, no bf16", "bfloat16"),
    "R2_ddp2_bf16loaded": ("DDP, bf16, bfloat16 weights", "bfloat16_logits"),
    "R2_ddp2_fp32loaded": ("DDP, bf16, float32 weights", "bfloat16_logits"),
    "R3_single_bf16loaded": ("1 process, bf16, bfloat16 weights", "bfloat16_logits"),
    "R3_single_fp32loaded": ("1 process, bf16, float32 weights", "bfloat16_logits"),
    "R4_fsdp2_bf16loaded": ("FSDP, bf16", "bfloat16_logits"),
    "R5_single_fp32": ("1 process, float32", "float32"),
}


def load_models(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and reference with weights in `dtype`, ready for `decisions_at`.

    Raises:
        FileNotFoundError: if the folder holds no recorded launches.
    """
    if not (folder / "pairs.json").is_file():
        raise FileNotFoundError(f"{folder} holds no recorded launches; give tests/data/regimes of a checkout")
    models = [load_causal_lm(folder / name, dtype=dtype).eval() for name in ("policy", "ref")]
    for model in models:
        expose_hidden_states(model)
    return models[0], models[1]


def load_pairs(folder: Path) -> Dataset:
    """The 96 pairs as the released code tokenised them."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = json.loads(read_text(folder / "pairs.json"))
    return Dataset.from_list(
        [{"pair_id": f"pair-{number}", **dict(zip(columns, pair, strict=True))} for number, pair in enumerate(pairs)]
    )


def recorded_decisions(folder: Path) -> pd.DataFrame:
    """What each launch decided with models that do not change.

    Returns:
        One row per launch, ε and pair: launch (name of the record), pair_id, epsilon, released (+1, 0, -1).
    """
    tables = []
    for launch in LAUNCHES:
        run = json.loads(read_text(folder / f"{launch}.json"))
        for epsilon, steps in run["decisions"].items():
            pairs = [f"pair-{number}" for number in range(len(steps))]
            columns = {"launch": launch, "pair_id": pairs, "epsilon": float(epsilon), "released": steps}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def launch_shares(recorded: pd.DataFrame) -> pd.DataFrame:
    """Shares of the decisions under each launch.

    Args:
        recorded: of `recorded_decisions`.

    Returns:
        One row per launch and ε, launches in the order of `LAUNCHES`: launch (in words), arithmetic, epsilon, pairs;
        for each decision its share and, as in `relaxed_low` and `relaxed_high`, the 95 % Wilson interval over pairs;
        mean_step.
    """
    rows = []
    for (launch, epsilon), alike in recorded.groupby(["launch", "epsilon"], sort=False):
        words, arithmetic = LAUNCHES[launch]
        row = {"launch": words, "arithmetic": arithmetic, "epsilon": epsilon, "pairs": len(alike)}
        for name, decision in DECISIONS.items():
            hits = alike["released"] == decision
            interval = share_interval(hits)
            row |= {name: hits.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
        rows.append(row | {"mean_step": alike["released"].mean()})
    return pd.DataFrame(rows)


def launches_in_words(shares: pd.DataFrame) -> pd.DataFrame:
    """`launch_shares` as a page shows it: a row per launch, and for each ε its ties with interval and its mean step."""
    shown = shares.assign(
        ties=[f"{row.tied:.0%} [{100 * row.tied_low:.0f}, {100 * row.tied_high:.0f}]" for row in shares.itertuples()],
        steps=[f"{row.relaxed:.0%} / {row.tightened:.0%} ({row.mean_step:+.2f})" for row in shares.itertuples()],
    )
    shown = shown.rename(columns={"ties": "tie", "steps": "β⁻ / β⁺ (mean step)"})
    wide = shown.pivot(index=["launch", "arithmetic"], columns="epsilon", values=["tie", "β⁻ / β⁺ (mean step)"])
    order = shares[["launch", "arithmetic"]].drop_duplicates().apply(tuple, axis=1)
    return (
        wide.swaplevel(axis=1)
        .sort_index(axis=1, level=0, sort_remaining=False)
        .loc[list(order)]
        .rename_axis(index=["launch of the released code", "criterion_dtype here"], columns=["ε", None])
    )


def agreement(measured: pd.DataFrame, recorded: pd.DataFrame) -> pd.DataFrame:
    """The share of pairs that are decided as under a launch, in the arithmetic that it has: launches by ε.

    Args:
        measured: of `measure_pairs`, on the same pairs.
        recorded: of `recorded_decisions`.
    """
    shares = {}
    for launch, alike in recorded.merge(measured, on=["pair_id", "epsilon"]).groupby("launch", sort=False):
        words, arithmetic = LAUNCHES[launch]
        shares[words] = (alike[arithmetic] == alike["released"]).groupby(alike["epsilon"]).mean()
    return pd.DataFrame(shares).T.rename_axis(index="launch", columns="epsilon")
