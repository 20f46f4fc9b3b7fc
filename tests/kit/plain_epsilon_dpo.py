"""ε-DPO on TRL in a few lines, by three whole softmaxes, and mutants of it that break one clause of the paper each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from epsdpo import EpsilonDPOTrainer


@dataclass
class PlainConfig(DPOConfig):
    epsilon: float = 0.01


class PlainTrainer(DPOTrainer):
    """What somebody might write from the paper."""

    def __init__(self, model, ref_model=None, args: PlainConfig | None = None, **named):
        if args.precompute_ref_log_probs:
            raise ValueError("the criterion needs the reference's logits")
        super().__init__(model, ref_model, args, **named)
        self.window = []
        self.add_callback(KeepBeta(self))

    def _compute_loss(self, model, inputs, return_outputs):
        mask = inputs["completion_mask"][:, 1:]
        labels = inputs["input_ids"][:, 1:, None]
        tensors = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def ratio(logits):
            logps = logits.log_softmax(-1).gather(2, labels).squeeze(2)
            chosen, rejected = (logps * mask).sum(dim=1).chunk(2)
            return chosen - rejected

        logits = model(**tensors).logits[:, :-1]
        with torch.no_grad():
            ref_logits = self.ref_model(**tensors).logits[:, :-1]
        perturbation = self.args.epsilon * (logits - ref_logits)
        current, lowered, raised = ratio(logits), ratio(logits + perturbation), ratio(logits - perturbation)
        steps = self.decisions(current, lowered, raised)
        loss = self.loss_of(self.beta_of(steps), steps, current, lowered, raised, ratio(ref_logits))
        if self.model.training:
            self.window.append(self.gathered(steps))
        return (loss, None) if return_outputs else loss

    def decisions(self, current, lowered, raised):
        relax = (lowered > current) & (current > raised)
        tighten = (lowered < current) & (current < raised)
        return relax.long() - tighten.long()

    def beta_of(self, steps):
        return self.beta / (1 + self.args.epsilon * steps)

    def loss_of(self, beta, steps, current, lowered, raised, reference):
        return -F.logsigmoid(beta * (current - reference)).mean()

    def gathered(self, steps):
        return self.accelerator.gather(steps)

    def training_step(self, *positional, **named):
        loss = super().training_step(*positional, **named)
        if self.accelerator.sync_gradients:
            self.move_beta(torch.cat(self.window).double())
            self.window.clear()
        return loss

    def move_beta(self, steps):
        self.beta /= 1 + self.args.epsilon * steps.mean().item()


class KeepBeta(TrainerCallback):
    """β in the state that goes into checkpoints, and back."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.get("beta")
        if kept:
            self.trainer.beta = kept["attributes"]["beta"]

    def on_step_end(self, args, state, control, **kwargs):
        state.stateful_callbacks["beta"] = {"args": {}, "attributes": {"beta": self.trainer.beta}}


# ---------------------------------------------------------------------------------------------------------- mutants


class ConstantBeta(EpsilonDPOTrainer):
    def next_beta(self, pairs):
        return self.beta


class MeanStepInBfloat16(EpsilonDPOTrainer):
    def next_beta(self, pairs):
        steps = torch.tensor(pairs["decision"].to_numpy(), dtype=torch.bfloat16)
        return self.beta / (1 + self.args.epsilon * steps.mean().item())


class MeanStepInTheLogitsDtype(PlainTrainer):
    """Which is seen of models in bfloat16 alone."""

    def move_beta(self, steps):
        self.beta /= 1 + self.args.epsilon * steps.to(self.model.dtype).mean().item()


class PerturbedPolicyInLoss(PlainTrainer):
    def loss_of(self, beta, steps, current, lowered, raised, reference):
        policy = torch.where(steps == 1, lowered, torch.where(steps == -1, raised, current))
        return -F.logsigmoid(beta * (policy - reference)).mean()


class GradientOfPerturbedPolicy(PlainTrainer):
    """The loss's value is right, and its gradient that of the perturbed policy."""

    def loss_of(self, beta, steps, current, lowered, raised, reference):
        policy = current.detach() + lowered - lowered.detach()
        return -F.logsigmoid(beta * (policy - reference)).mean()


class OtherBetas(PlainTrainer):
    """β(1 - ε) and β(1 + ε) in place of β/(1 + ε) and β/(1 - ε)."""

    def beta_of(self, steps):
        return self.beta * (1 - self.args.epsilon * steps)


class NoTies(PlainTrainer):
    """Only the two perturbed policies are compared, so that a log-ratio with an extremum takes a step too."""

    def decisions(self, current, lowered, raised):
        return (lowered > raised).long() - (lowered < raised).long()


class EqualIsMore(PlainTrainer):
    """Comparisons are not strict."""

    def decisions(self, current, lowered, raised):
        relax = (lowered >= current) & (current >= raised)
        return torch.where(relax, 1, super().decisions(current, lowered, raised))


class DPOWhenPrecomputed(PlainTrainer):
    def __init__(self, model, ref_model=None, args: PlainConfig | None = None, **named):
        precomputes, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
        super().__init__(model, ref_model, args, **named)
        self.precomputes = precomputes

    def _compute_loss(self, model, inputs, return_outputs):
        if not self.precomputes:
            return super()._compute_loss(model, inputs, return_outputs)
        self.window.append(torch.zeros(1))
        return DPOTrainer._compute_loss(self, model, inputs, return_outputs)


class BetaLostOnResume(EpsilonDPOTrainer):
    def set_beta_state(self, state):
        super().set_beta_state({**state, "beta": self.args.beta})


class EvaluationMovesBeta(PlainTrainer):
    def evaluate(self, *positional, **named):
        metrics = super().evaluate(*positional, **named)
        self.move_beta(torch.ones(1).double())
        return metrics


class FullWindowAlways(PlainTrainer):
    """A shorter last window is divided by the full one."""

    def move_beta(self, steps):
        full = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        ends = self.args.gradient_accumulation_steps > 1
        super().move_beta(steps * len(steps) / full if ends else steps)


class LastMicroBatchAlone(PlainTrainer):
    """β follows the last micro-batch of a window."""

    def move_beta(self, steps):
        super().move_beta(steps[-self.args.per_device_train_batch_size :])


class RankAlone(PlainTrainer):
    """Each process moves a β of its own."""

    def gathered(self, steps):
        return steps


class OneProcessOnly(PlainTrainer):
    def gathered(self, steps):
        if self.accelerator.num_processes > 1:
            raise NotImplementedError("several processes")
        return steps
