"""`EpsilonDPOConfig`: TRL's `DPOConfig` and the keys of ε-DPO, refused early when they make no sense.

Options of TRL under which ε-DPO has no meaning, or which would silently not be applied, are refused by name.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig

from epsdpo.methods.launches import CRITERION_DTYPES
from epsdpo.methods.method_config import MethodConfig

BETA_UPDATES = ("mean_step", "mean_beta")


@dataclass
class EpsilonDPOConfig(MethodConfig, DPOConfig):
    """Configuration of [`EpsilonDPOTrainer`]: every key of `trl.DPOConfig`, and those below.

    Each help text ends with its source: [P] the paper, [R] its released code or configuration, [K] this kit.

    Raises:
        ValueError: naming the value and the remedy, if a key is out of range or an option of TRL is set that ε-DPO is
            not defined for.
    """

    _method_name: ClassVar[str] = "ε-DPO"

    epsilon: float = field(
        default=0.01,
        metadata={
            "help": "Relative size ε_c of the perturbation of β that the criterion looks at; in (0, 1). [P: Eqs. 3 and "
            "4; Table 6 searches 0.005, 0.01 and 0.02]"
        },
    )
    epsilon_step: float | None = field(
        default=None,
        metadata={
            "help": "Relative size ε_s of the step that β takes; in [0, 1). Default: the same as `epsilon`. 0 leaves β "
            "constant: plain DPO, with the decisions recorded. [P: Table 5 varies ε_c and ε_s apart]"
        },
    )
    criterion_dtype: str = field(
        default="float32",
        metadata={
            "help": "Arithmetic of the criterion, by which launch of the released code it is. 'float32' is exact: its "
            "launch without bf16. 'bfloat16' rounds every operation from logits to sequence sums: its launch under "
            "DeepSpeed ZeRO-3, the published one, where most pairs tie; its decisions are reproduced and not its loss, "
            "which was made of bfloat16 sums too and is exact here. 'bfloat16_logits' rounds both models' logits, "
            "for the criterion and for the loss, and nothing after them: its launch with bf16 on one process, DDP or "
            "FSDP, where hardly any pair ties. 'float16' rounds as 'bfloat16' does, to eight times as fine a grid. [K]",
            "choices": list(CRITERION_DTYPES),
        },
    )
    round_rotary_frequencies: bool = field(
        default=False,
        metadata={
            "help": "Round the rotary frequencies of policy and reference to bfloat16 in training, as DeepSpeed 0.16 "
            "did in the published launch and as it no longer does with transformers 5: for decisions that are to be "
            "equal to the bit, with criterion_dtype: bfloat16 and weights in bfloat16. Models are saved and evaluated "
            "without it. [R]",
        },
    )
    beta_update: str = field(
        default="mean_step",
        metadata={
            "help": "How β follows the batch: 'mean_step' is the released code's β/(1 + ε·mean step), 'mean_beta' is "
            "Algorithm 1's mean of the pairs' β̃. They differ by O(ε²) per step. [R]",
            "choices": list(BETA_UPDATES),
        },
    )
    fresh_beta: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint that holds no β state, as another trainer writes it, by starting β over "
            "from `beta`. Without it such a checkpoint is refused, since the run would not be the one that was "
            "interrupted. [K]"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.epsilon_step is None:
            self.epsilon_step = self.epsilon
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(
                f"epsilon={self.epsilon} must lie in (0, 1), so that β/(1 - ε) stays positive. The paper uses 0.01"
            )
        if not 0.0 <= self.epsilon_step < 1.0:
            raise ValueError(
                f"epsilon_step={self.epsilon_step} must lie in [0, 1). Leave it out to use epsilon={self.epsilon}"
            )
        if not self.beta > 0.0:
            raise ValueError(
                f"beta={self.beta} must be positive: ε-DPO scales it and can never leave 0. The paper starts from 0.01"
            )
        if self.criterion_dtype not in CRITERION_DTYPES:
            raise ValueError(f"criterion_dtype={self.criterion_dtype!r} is not one of {tuple(CRITERION_DTYPES)}")
        if self.beta_update not in BETA_UPDATES:
            raise ValueError(f"beta_update={self.beta_update!r} is not one of {BETA_UPDATES}")
        for key, (set_by_user, remedy) in self._refusals().items():
            if set_by_user:
                raise ValueError(f"{key}={getattr(self, key)!r} cannot be combined with {self._method_name}: {remedy}")

    def _refusals(self) -> dict[str, tuple[bool, str]]:
        """Options of TRL under which the per-pair β of Eq. 5 has no meaning, or would silently not be applied.

        Returns:
            key -> (whether it is set, the reason why it cannot be and the remedy).
        """
        return {
            "loss_type": (
                list(self.loss_type) != ["sigmoid"],
                "ε-DPO is defined for the sigmoid loss only. Remove it, or use trl.DPOTrainer",
            ),
            "loss_weights": (
                self.loss_weights not in (None, [1.0]),
                "ε-DPO has a single loss. Remove it and scale the learning rate instead",
            ),
            "precompute_ref_log_probs": (
                self.precompute_ref_log_probs,
                "the criterion needs the reference's logits, not only its log-probabilities. Set it to False",
            ),
            "label_smoothing": (
                self.label_smoothing != 0.0,
                "it has no effect on the sigmoid loss, in TRL and in the released ε-DPO code alike. Set it to 0.0",
            ),
            "f_divergence_type": (
                self.f_divergence_type != "reverse_kl",
                "Proposition 1 holds for the reverse KL penalty. Set it to 'reverse_kl'",
            ),
            "ld_alpha": (
                self.ld_alpha is not None,
                "the criterion compares whole completions. Set it to None",
            ),
            "use_weighting": (
                self.use_weighting,
                "WPO's weights are not part of ε-DPO. Set it to False",
            ),
            "use_liger_kernel": (
                self.use_liger_kernel,
                "the trainer has its own tiled head. Set it to False",
            ),
            "parallelism_config": (
                self.parallelism_config is not None,
                "sequences and heads are taken whole by each process. Remove it and shard with FSDP2 or ZeRO-3",
            ),
            "dataloader_drop_last": (
                self.dataloader_drop_last,
                "how many pairs it leaves out depends on the number of processes. Set it to False; a last step of "
                "fewer pairs is weighed by how many they are",
            ),
            "auto_find_batch_size": (
                self.auto_find_batch_size,
                "it shrinks the global batch, and with it changes the run. Set it to False and choose a smaller "
                "per_device_train_batch_size, which does not",
            ),
            "train_sampling_strategy": (
                self.train_sampling_strategy not in ("random", "sequential"),
                "it orders pairs by the number of processes. Set it to 'random' or 'sequential'",
            ),
            "padding_free": (
                self.padding_free,
                "TRL has it switched off for DPO at present. Set it to False",
            ),
        }
