"""The passes in their order: exact arithmetic of every policy, the predictions, and then all arithmetic that rounds.

What is computed is kept as it comes, in a folder for all that decides it: hidden states for a policy, what is foretold
and what is decided for a policy and an ε. A pass that was killed goes on where it stopped, and a finished one is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from epsdpo.experiment import ConfigError
from epsdpo.files import written_whole
from epsdpo.methods.heads import head_of, require_same_arithmetic
from epsdpo.methods.kernels import Head
from epsdpo.paper.frozen import load_frozen
from epsdpo.paper.precision import decisions
from epsdpo.paper.precision.decisions import exact_sums, foretold_table, variance_sums
from epsdpo.paper.precision.rounding import rounded_decisions
from epsdpo.paper.real_text.bench import Benches
from epsdpo.paper.real_text.foretold import predictions
from epsdpo.paper.real_text.seal import Seal, sealed
from epsdpo.paper.real_text.subjects import Policy, Subject, subjects_of
from epsdpo.runs.layout import NOTEBOOKS, REAL_TEXT
from epsdpo.runs.reach import digest, reached

EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)
NOTEBOOK = "08_real_text.ipynb"
_SUMS = [f"sum {place} {side}" for place in ("0", "+", "-") for side in ("chosen", "rejected")]


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        table: a row per policy, ε and pair: policy, run, step, prompt, the columns of `foretold_table`, and what each
            arithmetic decides.
        seal: the predictions of `predictions`, which are older than every decision in arithmetic that rounds.
        first_measured: when the first of these was written, UTC.
    """

    table: pd.DataFrame
    seal: Seal
    first_measured: str


def measure(run_dir: Path, epsilons: Sequence[float] = EPSILONS) -> Measured:
    """Foretell and then measure what the criterion decides with the policies of a run folder.

    Raises:
        ConfigError: if there is no policy, or what was kept is not what was left.
    """
    subjects = subjects_of(run_dir)
    folder = run_dir / REAL_TEXT / _key(subjects, epsilons)
    folder.mkdir(parents=True, exist_ok=True)
    benches = Benches()
    works = [
        _Work(subject, policy, folder, benches, f"policy {number}/{sum(len(each.policies) for each in subjects)}")
        for number, (subject, policy) in enumerate(
            ((subject, policy) for subject in subjects for policy in subject.policies), start=1
        )
    ]
    foretold = pd.concat([work.foretell(epsilons) for work in works], ignore_index=True)
    any_measured = any(work.decided_file(epsilon).exists() for work in works for epsilon in epsilons)
    seal = sealed(folder, predictions(foretold), measured=any_measured)
    decided = pd.concat([work.decide(epsilons, seal) for work in works], ignore_index=True)
    for work in works:
        work.states_file.unlink(missing_ok=True)
    policies = pd.DataFrame([vars(work.policy) for work in works]).drop(columns="folder")
    table = foretold.drop(columns=_SUMS).merge(
        decided.drop(columns=["after", "measured"]), on=["policy", "epsilon", "pair_id"], validate="one_to_one"
    )
    table = table.merge(policies.rename(columns={"name": "policy"}), on="policy", validate="many_to_one")
    return Measured(table, seal, decided["measured"].min())


def _key(subjects: Sequence[Subject], epsilons: Sequence[float]) -> str:
    """Of all that decides what is kept."""
    parts = {
        "policies": {policy.name: subject.training for subject in subjects for policy in subject.policies},
        "pairs": [subject.digest for subject in subjects],
        "epsilons": list(epsilons),
        "code": reached(NOTEBOOKS / NOTEBOOK, "measure"),
    }
    return digest(json.dumps(parts, sort_keys=True))[:8]


@dataclass
class _Work:
    """A policy, and where what is computed of it lies."""

    subject: Subject
    policy: Policy
    folder: Path
    benches: Benches
    place: str  # among the policies, for people

    @property
    def states_file(self) -> Path:
        return self.folder / f"{self.policy.name}.safetensors"

    def foretold_file(self, epsilon: float) -> Path:
        return self.folder / f"{self.policy.name}-epsilon{epsilon:g}-foretold.parquet"

    def decided_file(self, epsilon: float) -> Path:
        return self.folder / f"{self.policy.name}-epsilon{epsilon:g}-decided.parquet"

    def foretell(self, epsilons: Sequence[float]) -> pd.DataFrame:
        """`foretold_table` at each ε, with the exact sums behind it; no arithmetic that rounds is run."""
        return self._tables(epsilons, "exact", self.foretold_file, self._foretell)

    def decide(self, epsilons: Sequence[float], seal: Seal) -> pd.DataFrame:
        """What each arithmetic that rounds decides at each ε, and after which predictions.

        Raises:
            ConfigError: if something was kept after other predictions.
        """
        table = self._tables(epsilons, "rounded", self.decided_file, lambda epsilon: self._decide(epsilon, seal))
        if set(table["after"]) != {seal.digest}:
            raise ConfigError(
                f"{self.folder}: decisions of {self.policy.name} were measured after other predictions. Move it away"
            )
        return table

    def _foretell(self, epsilon: float) -> pd.DataFrame:
        bench, (states, variances) = self.benches.of(self.subject), self._states
        tables = []
        for pair_ids, of_batch, of_slopes in zip(bench.pair_ids, bench.states(states), variances, strict=True):
            sums = exact_sums(of_batch, self._heads, epsilon, of_slopes)
            kept = sums.exact.reshape(len(_SUMS), len(pair_ids))
            tables.append(foretold_table(pair_ids, epsilon, sums).assign(**dict(zip(_SUMS, kept, strict=True))))
        table = pd.concat(tables, ignore_index=True)
        return table.assign(policy=self.policy.name, prompt=table["pair_id"].map(bench.prompts))

    def _decide(self, epsilon: float, seal: Seal) -> pd.DataFrame:
        bench, (states, _) = self.benches.of(self.subject), self._states
        foretold = pd.read_parquet(self.foretold_file(epsilon))
        tables = [
            pd.DataFrame({"pair_id": pair_ids, **decisions.rounded_steps(of_batch, self._heads, epsilon)})
            for pair_ids, of_batch in zip(bench.pair_ids, bench.states(states), strict=True)
        ]
        table = pd.concat(tables, ignore_index=True)
        sums = foretold.set_index("pair_id").loc[table["pair_id"], _SUMS].to_numpy().T
        return table.assign(
            sums_rounded=rounded_decisions(sums.reshape(3, 2 * len(table))),
            policy=self.policy.name,
            epsilon=epsilon,
            after=seal.digest,
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @cached_property
    def _model(self) -> PreTrainedModel:
        bench = self.benches.of(self.subject)
        policy = load_frozen(self.subject.experiment, str(self.policy.folder), bench.device)
        require_same_arithmetic(policy, bench.reference)
        return policy

    @property
    def _heads(self) -> tuple[Head, Head]:
        return head_of(self._model), self.benches.of(self.subject).head

    @cached_property
    def _states(self) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        """The policy's hidden states of each batch, and the variances of its slopes."""
        bench = self.benches.of(self.subject)
        if not self.states_file.exists():
            hidden = bench.states_of(self._model, self.subject, f"{self.place}, {self.policy.name}")
            kept = {f"hidden {place}": states.contiguous() for place, states in enumerate(hidden)}
            for place, states in enumerate(bench.states(hidden)):
                kept[f"variances {place}"] = torch.from_numpy(variance_sums(states, self._heads))
            with written_whole(self.states_file) as partial:
                save_file(kept, partial)
        kept = load_file(self.states_file, device=str(bench.device))
        numbers = range(len(bench.batches))
        variances = [kept[f"variances {number}"].cpu().numpy() for number in numbers]
        return [kept[f"hidden {number}"] for number in numbers], variances

    def _tables(
        self,
        epsilons: Sequence[float],
        what: str,
        file_of: Callable[[float], Path],
        compute: Callable[[float], pd.DataFrame],
    ) -> pd.DataFrame:
        """A table for each ε, computed where it is not kept yet; the policy is held no longer than that takes."""
        for epsilon in epsilons:
            file = file_of(epsilon)
            if file.exists():
                continue
            started = time.monotonic()
            table = compute(epsilon)
            with written_whole(file) as partial:
                table.to_parquet(partial, index=False)
            print(
                f"{self.place}, {self.policy.name}, ε = {epsilon:g}, {what}: {len(table)} pairs in "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        for held in ("_model", "_states"):
            self.__dict__.pop(held, None)
        return pd.concat([pd.read_parquet(file_of(epsilon)) for epsilon in epsilons], ignore_index=True)
