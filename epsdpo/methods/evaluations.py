"""`SeparateEvaluations`: each evaluation of a trainer of TRL by itself, with policy and reference in one arithmetic.

transformers prepares a model before an evaluation, and TRL collects metrics over several: both would change numbers.
"""

from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput


class SeparateEvaluations:
    """Mixin before a trainer of TRL, with or without a reference: `evaluate()` says what its own data say.

    TRL collects metrics until they are logged, which those of `predict()` never are, nor those of an evaluation that
    was interrupted.
    """

    def trl_metrics(self, mode: str) -> dict[str, list[float]]:
        """What TRL has collected since the last log, a value per micro-batch; `mode` is "train" or "eval"."""
        raise NotImplementedError

    def evaluation_loop(self, *positional: Any, **named: Any) -> EvalLoopOutput:
        self._prepare_like_training()
        self._forget_evaluation()
        try:
            return super().evaluation_loop(*positional, **named)
        except BaseException:
            self._forget_evaluation()
            raise

    def predict(self, *positional: Any, **named: Any) -> PredictionOutput:
        output = super().predict(*positional, **named)
        self._forget_evaluation()
        return output

    def _forget_evaluation(self) -> None:
        self.trl_metrics("eval").clear()

    def _prepare_like_training(self) -> None:
        """Let transformers give the policy the precision that the reference has, also before training."""
        reference = getattr(self, "ref_model", None)
        if reference is None:
            return
        # Before training transformers has accelerate prepare the policy only if that holds no model yet. TRL has let it
        # prepare the reference.
        self.accelerator._models = [model for model in self.accelerator._models if model is not reference]
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            # Which transformers does with the policy alone.
            reference.to(torch.float16 if self.args.fp16_full_eval else torch.bfloat16)
