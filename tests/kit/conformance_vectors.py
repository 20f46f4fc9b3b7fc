"""Makes the vectors, by this kit's kernels in float64: `python tests/kit/conformance_vectors.py`.

Pairs are drawn until each one's decision, and each along the path of training, is clear of any rounding in float32.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epsdpo.files import written_whole
from epsdpo.methods.kernels import (
    ARITHMETICS,
    EXACT,
    Arithmetic,
    Head,
    dpo_loss,
    pair_steps,
    score_tokens,
    updated_beta,
)
from epsdpo.paper.conformance.vectors import CRITERION, END, PADDING, TRAINING, model_of

BETA, EPSILON, LEARNING_RATE = 0.2, 0.3, 0.02
ROUNDED_EPSILON = 0.005  # at which bfloat16 ties where exact arithmetic steps
WINDOW, STEPS = 6, 6
WANTED = {1: 5, -1: 4, 0: 3}
CLEAR = 0.1  # nats by which the three log-ratios of a pair differ; half of it along the path
CANDIDATES, SEEDS = 200, 200
PROMPT, LONGEST = 3, 6  # tokens, of a completion with its end
PRECISE = 4  # decimals of the logits in the file of the criterion

WORDS = [f"w{number}" for number in range(22)]
VOCABULARY = [PADDING, END, *WORDS]
MODEL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PAPER = "arXiv 2502.13177"

Pair = dict[str, Any]


class Scored(NamedTuple):
    """Pairs under the equations: one value each, of `log_ratio` three (current policy, β lowered, β raised)."""

    log_ratio: torch.Tensor
    margin: torch.Tensor  # what the log-ratio has more than the reference's, with a gradient
    decision: torch.Tensor

    def beta(self, beta: float) -> torch.Tensor:
        """β̃ of Eq. 5, in float64 where the trainer's float32 would do."""
        return beta / (1.0 + EPSILON * self.decision.double())

    def clear(self) -> torch.Tensor:
        """By how much the log-ratios of each pair are apart, in nats."""
        current, lowered, raised = self.log_ratio.detach()
        return torch.minimum((lowered - current).abs(), (current - raised).abs())


def score(policy: Any, reference: Any, pairs: Sequence[Pair], epsilon: float, arithmetic: Arithmetic = EXACT) -> Scored:
    """Pairs under two models, each pair alone, so that no padding is in it."""

    def side(pair, name):
        labels = torch.tensor(pair[name])
        ids = torch.tensor([pair["prompt_ids"] + pair[name]])
        states, ref_states = (
            model.model(ids).last_hidden_state[0, -len(labels) - 1 : -1] for model in (policy, reference)
        )
        heads = (Head(model.lm_head.weight) for model in (policy, reference))
        return states, next(heads), ref_states.detach(), next(heads), labels

    return _joined(
        [score_pair(side(pair, "chosen_ids"), side(pair, "rejected_ids"), epsilon, arithmetic) for pair in pairs]
    )


def score_pair(chosen: tuple, rejected: tuple, epsilon: float, arithmetic: Arithmetic = EXACT) -> Scored:
    """One pair, each response by hidden states and head of policy and of reference, and by its labels."""
    tokens = [score_tokens(*side, epsilon, arithmetic) for side in (chosen, rejected)]
    sums = torch.stack([token.criterion.sum(dim=1) for token in tokens], dim=1)
    current = tokens[0].logps.sum() - tokens[1].logps.sum()
    margin = current - tokens[0].ref_logps.sum() + tokens[1].ref_logps.sum()
    dtype = sums.dtype if arithmetic.criterion == torch.float32 else arithmetic.criterion
    return Scored(current + sums[:, 0] - sums[:, 1], margin, pair_steps(sums, dtype)[0])


def _joined(scored: list[Scored]) -> Scored:
    return Scored(*(torch.stack(field, dim=-1) for field in zip(*scored, strict=True)))


def path(vectors: dict[str, Any], rule: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """β, losses and decisions of a training by plain gradient descent, and the weights after its first step.

    Raises:
        ValueError: if a decision on the way is not clear.
    """
    policy, reference = _models(vectors)
    optimiser = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE)
    betas, losses, decisions, weights = [BETA], [], [], {}
    for step in range(STEPS):
        start = step * WINDOW % len(vectors["pairs"])
        scored = score(policy, reference, vectors["pairs"][start : start + WINDOW], EPSILON)
        if scored.clear().min() < CLEAR / 2:
            raise ValueError(f"a decision at step {step + 1} is not clear")
        loss = dpo_loss(scored.margin, scored.beta(betas[-1])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        weights = weights or {name: weight.tolist() for name, weight in policy.state_dict().items()}
        relaxed, tightened = (int((scored.decision == way).sum()) for way in (1, -1))
        losses.append(loss.item())
        decisions.append(scored.decision.tolist())
        betas.append(updated_beta(betas[-1], relaxed, tightened, WINDOW, EPSILON, rule))
    return {"decision": decisions, "loss": losses, "beta": betas}, weights


def draw(seed: int) -> dict[str, Any]:
    """Models and pairs of one seed, with what becomes of them.

    Raises:
        ValueError: if it has too few pairs that are clear, or a path that is not.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = {"paper": PAPER, "model": MODEL, "vocabulary": VOCABULARY, **_draw_weights(generator)}
    candidates = [_draw_pair(generator) for _ in range(CANDIDATES)]
    vectors["pairs"] = _choose(vectors, candidates, generator)
    vectors["arguments"] = {"beta": BETA, "epsilon": EPSILON, "learning_rate": LEARNING_RATE}
    scored = score(*_models(vectors), vectors["pairs"], EPSILON)
    vectors["one_by_one"] = _expected(scored)
    vectors["window"] = WINDOW
    paths = {rule: path(vectors, rule) for rule in ("mean_step", "mean_beta")}
    vectors["paths"] = {rule: values for rule, (values, _) in paths.items()}
    vectors["weights_after_first_step"] = paths["mean_step"][1]
    vectors["rounded"] = {"epsilon": ROUNDED_EPSILON, "pairs": torch.nonzero(scored.decision).flatten().tolist()}
    return vectors


def _models(vectors: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[LlamaForCausalLM]:
    return [model_of(vectors, role, dtype) for role in ("policy", "reference")]


def _draw_weights(generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """Weights of 8 bits, so that bfloat16 holds them; those of norms are 1."""

    def normal(weight, size):
        return (64 * size * torch.randn(weight.shape, generator=generator)).round()

    policy, reference = {}, {}
    for name, weight in LlamaForCausalLM(LlamaConfig(**MODEL)).state_dict().items():
        one = torch.full_like(weight, 64) if weight.dim() == 1 else normal(weight, 0.5)
        other = one if weight.dim() == 1 else one + normal(weight, 0.2)
        policy[name], reference[name] = ((values.clamp(-127, 127) / 64).tolist() for values in (one, other))
    return {"policy": policy, "reference": reference}


def _choose(vectors: dict[str, Any], candidates: list[Pair], generator: torch.Generator) -> list[Pair]:
    """As many clear pairs of each decision as are wanted, in an order in which parts of windows tell from wholes."""
    with torch.no_grad():
        scored, small = (score(*_models(vectors), candidates, epsilon) for epsilon in (EPSILON, ROUNDED_EPSILON))
        in_logits, throughout = (
            score(*_models(vectors, torch.bfloat16), candidates, ROUNDED_EPSILON, ARITHMETICS[name]).decision
            for name in ("bfloat16_logits", "bfloat16")
        )
    margin, clear, decision = scored.margin.abs(), scored.clear(), scored.decision
    good = (clear > CLEAR) & (margin > 1) & (margin < 8)
    alike = (clear > 5 * CLEAR) & (decision == small.decision) & (decision == in_logits) & (throughout == 0)
    good &= (decision == 0) | alike
    chosen: list[int] = []
    for way, count in WANTED.items():
        found = torch.nonzero(good & (decision == way)).flatten().tolist()[:count]
        if len(found) < count:
            raise ValueError(f"only {len(found)} pairs of decision {way}")
        chosen += found
    numbers = [chosen[place] for place in torch.randperm(len(chosen), generator=generator).tolist()]
    parts = decision[numbers].reshape(-1, 3).sum(dim=1).tolist()
    if parts[0] == parts[1] or parts[2] == parts[3] or parts[2] == 0:
        raise ValueError("half a window has the mean step of the whole, or the last window none")
    return [candidates[number] for number in numbers]


def _draw_pair(generator: torch.Generator) -> Pair:
    def ids(length):
        return torch.randint(2, len(VOCABULARY), (length,), generator=generator).tolist()

    lengths = torch.randint(2, LONGEST, (2,), generator=generator).tolist()
    pair = {"prompt_ids": ids(PROMPT), "chosen_ids": ids(lengths[0]), "rejected_ids": ids(lengths[1])}
    words = {name.removesuffix("_ids"): " ".join(VOCABULARY[number] for number in pair[name]) for name in pair}
    # A space parts prompt and completion; the end is what a trainer of TRL appends.
    texts = {name: text if name == "prompt" else f" {text}" for name, text in words.items()}
    return texts | {name: pair[name] + [1] * (name != "prompt_ids") for name in pair}


def _expected(scored: Scored) -> dict[str, Any]:
    losses = dpo_loss(scored.margin, scored.beta(BETA))
    return {
        "log_ratio": scored.log_ratio.T.tolist(),
        "margin": scored.margin.tolist(),
        "decision": scored.decision.tolist(),
        "beta_tilde": scored.beta(BETA).tolist(),
        "loss": losses.tolist(),
        "loss_by_margin": torch.autograd.grad(losses.sum(), scored.margin)[0].tolist(),
    }


def criterion(vectors: dict[str, Any]) -> dict[str, Any]:
    """The pairs of `vectors` by their logits, rounded, and what the equations make of those."""
    models = _models(vectors)
    whole = Head(torch.eye(len(VOCABULARY), dtype=torch.float64))
    pairs, scored = [], []
    for pair in vectors["pairs"]:
        entry, sides = {}, []
        for side in ("chosen", "rejected"):
            ids, count = pair["prompt_ids"] + pair[f"{side}_ids"], len(pair[f"{side}_ids"])
            with torch.no_grad():
                logits, ref_logits = (
                    model(torch.tensor([ids])).logits[0, :-1].round(decimals=PRECISE) for model in models
                )
            mask = [0] * (len(ids) - 1 - count) + [1] * count
            entry[side] = {"labels": ids[1:], "mask": mask, "policy": logits.tolist(), "reference": ref_logits.tolist()}
            logits.requires_grad_()
            sides.append((logits[-count:], whole, ref_logits[-count:], whole, torch.tensor(ids[-count:])))
        pairs.append(entry)
        scored.append(score_pair(*sides, EPSILON))
    return {
        "paper": PAPER,
        "arguments": {"beta": BETA, "epsilon": EPSILON},
        "pairs": pairs,
        **_expected(_joined(scored)),
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """A line for each value, and where it has parts of its own, for each of these."""

    def lines(value, deeper):
        parts = value.values() if isinstance(value, dict) else value
        if not (deeper and isinstance(value, dict | list) and any(isinstance(part, dict | list) for part in parts)):
            return json.dumps(value)
        inner = [lines(part, deeper - 1) for part in parts]
        if isinstance(value, dict):
            return (
                "{\n"
                + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in zip(value, inner, strict=True))
                + "\n}"
            )
        return "[\n" + ",\n".join(inner) + "\n]"

    with written_whole(path) as unfinished:
        unfinished.write_text(lines(values, 2) + "\n", encoding="utf-8")


def main() -> None:
    for seed in range(SEEDS):
        try:
            vectors = draw(seed)
        except ValueError as error:
            print(f"seed {seed}: {error}")
            continue
        print(f"seed {seed}: clear")
        write(TRAINING, vectors)
        write(CRITERION, criterion(vectors))
        return
    raise SystemExit(f"none of {SEEDS} seeds is clear")


if __name__ == "__main__":
    main()
