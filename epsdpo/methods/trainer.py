"""`EpsilonDPOTrainer`: TRL's `DPOTrainer` with the loss of ε-DPO, a β that moves, and a record of how it moved.

What TRL and transformers ask of a trainer is here: a loss, accumulation, logs, checkpoints. Other methods of one pass
over policy and reference derive from it and say what their `losses` and their `next_beta` are.
"""

import contextlib
import dataclasses
import inspect
import logging
import textwrap
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy
from trl import DPOConfig, DPOTrainer, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from epsdpo.methods.beside import require_written_by_trl
from epsdpo.methods.beta_state import get_entry, put_entry, require_beta, require_same_layout, require_same_run
from epsdpo.methods.chat_template import writes_date
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.methods.evaluations import SeparateEvaluations
from epsdpo.methods.former_names import refuse_former_arguments
from epsdpo.methods.heads import (
    expose_hidden_states,
    head_of,
    require_same_vocabulary,
    require_separable_head,
    round_rotary_frequencies,
)
from epsdpo.methods.kernels import ARITHMETICS, TokenScores, dpo_loss, pair_beta, pair_steps, score_tokens, updated_beta
from epsdpo.methods.launches import arithmetic_of
from epsdpo.methods.loading import never_running_code
from epsdpo.methods.metrics import decision_metrics, pair_table, preference_metrics, stack_columns, step_row
from epsdpo.methods.pair_index import (
    REPEATED,
    KeepPairIndex,
    ScoredPairs,
    mark_repeats,
    number_rows,
    pair_ids,
    require_one_order,
)
from epsdpo.methods.record import PAIR_SCHEMA
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.methods.resuming import Resumable
from epsdpo.methods.saved_reference import hold_to_policy, load_reference, require_keepable, reshard, save_reference
from epsdpo.methods.sharding import (
    as_loaded,
    begin_sharded_training,
    keep_results_in_float32,
    saved_whole,
    sharding_of,
    share_out_reference,
    warn_of_lost_updates,
)
from epsdpo.methods.vocabulary import TOKENISED_COLUMNS, require_known_tokens

logger = logging.getLogger(__name__)


class EpsilonDPOTrainer(Resumable, SeparateEvaluations, DPOTrainer):
    """Trainer for ε-DPO (arXiv 2502.13177); it is called as `trl.DPOTrainer` is, with an `EpsilonDPOConfig`.

    For each pair β̃ is β/(1+ε), β or β/(1-ε), by whether the pair's log-ratio is monotone under a perturbation of β
    (Eq. 5); the loss is sigmoid DPO with β̃, and after each optimiser step β follows the mean over all its pairs, of
    all micro-batches and processes (Algorithm 1). Evaluation reports the decisions and leaves β alone.

    β is kept in the checkpoints, so an interrupted run continues as if it had not been interrupted; from checkpoints
    and records that are not whole it does not. Beside TRL's metrics it logs `kl/beta`
    (the β of the step), `kl/p_epsilon_steps` and `kl/n_epsilon_steps` (fractions of pairs that chose β⁻ and β⁺) and
    `kl/avg_steps` (their difference); rewards use each pair's β̃. Every step and pair is written to `output_dir`, for
    `read_steps` and `read_pairs`; pairs are named by the data's `pair_id` column, or by row number.

    Data may be in any format that TRL takes, or already tokenised, with columns `prompt_ids`, `chosen_ids` and
    `rejected_ids` (lists of int), which are used as they are.

    Raises:
        ValueError: for a model or option that ε-DPO cannot serve, for a checkpoint that is damaged, holds no β or
            that of a run with other settings, and for an `output_dir` that holds a run which is not to be continued.
        FloatingPointError: when a pair's loss is not finite; the message names step, β and pairs.
    """

    # Keys of the config that a run must not change when it is resumed.
    kept_settings = (
        "beta",
        "epsilon",
        "epsilon_step",
        "criterion_dtype",
        "round_rotary_frequencies",
        "beta_update",
        "global_batch_size",
    )

    _ref_model = None
    _tag_names = ["trl", "dpo", "epsilon-dpo"]
    _name = "ε-DPO"
    _paper = {
        "title": "KL Penalty Control via Perturbation for Direct Preference Optimization",
        "id": "2502.13177",
        "citation": textwrap.dedent("""\
            @inproceedings{lee2025kl,
                title     = {{KL Penalty Control via Perturbation for Direct Preference Optimization}},
                author    = {Sangkyu Lee and Janghoon Han and Hosung Song and
                             Stanley Jungkyu Choi and Honglak Lee and Youngjae Yu},
                booktitle = {Advances in Neural Information Processing Systems 38 (NeurIPS 2025)},
                year      = 2025,
                url       = {https://arxiv.org/abs/2502.13177},
            }"""),
    }

    def __init__(self, model, ref_model=None, args: EpsilonDPOConfig | None = None, *positional, **named):
        known = inspect.signature(DPOTrainer.__init__).parameters
        keys = {field.name for field in dataclasses.fields(EpsilonDPOConfig)}
        refuse_former_arguments(type(self).__name__, named, known, keys)
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = EpsilonDPOConfig(f"{model_id.split('/')[-1]}-EpsilonDPO")
        elif not isinstance(args, EpsilonDPOConfig):
            kind = "trl.DPOConfig" if isinstance(args, DPOConfig) else type(args).__name__
            raise TypeError(
                f"args is a {kind}; EpsilonDPOTrainer needs an epsdpo.EpsilonDPOConfig, which has all its keys"
            )
        with never_running_code(model if isinstance(model, str) else "the model"):
            super().__init__(model, ref_model, args, *positional, **named)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        require_one_order(self.args, self.accelerator, [self.train_dataset, *evaluated])
        if self._is_vision_dataset:
            raise ValueError("the data set holds images; ε-DPO is implemented for text models only")
        if self.aux_loss_enabled:
            raise ValueError(
                "the model is a mixture of experts with a load-balancing loss, which ε-DPO does not add. "
                "Set router_aux_loss_coef=0.0 to train without it"
            )
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        require_known_tokens(
            [table for table in (self.train_dataset, *evaluated) if isinstance(table, Dataset)],
            self.processing_class,
            policy.config.get_text_config().vocab_size,
            policy.name_or_path,
        )
        require_separable_head(policy)
        expose_hidden_states(policy)
        if self.ref_model is not None:
            require_same_vocabulary(policy, self.accelerator.unwrap_model(self.ref_model))
        hold_to_policy(self.model, self.ref_model, self.accelerator)
        if self.args.round_rotary_frequencies:
            for each in filter(None, (self.model, self.ref_model)):
                round_rotary_frequencies(self.accelerator.unwrap_model(each))
        self.data_collator = KeepPairIndex(self.data_collator)
        self.record = BetaRecord(self.args.output_dir)
        self.record.criterion = {
            "arithmetic": self.args.criterion_dtype,
            "released_launch": arithmetic_of(
                self.accelerator.mixed_precision,
                self.accelerator.distributed_type == DistributedType.DEEPSPEED,
                str(self.model.dtype).removeprefix("torch."),
            ),
        }
        self.add_callback(_Bookkeeping(self))
        warn_of_lost_updates(self.model, self.accelerator, self.args.learning_rate)
        self._loaded_dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        self._pair_ids = pair_ids(self.train_dataset)
        self._pairs_seen = 0
        self._window: list[pd.DataFrame] = []  # the micro-batches of the optimiser step under way
        self._window_pairs: int | None = None  # how many pairs it has, over all processes
        self._evaluated: list[pd.DataFrame] = []  # the batches of the evaluation under way
        self._step_pairs = pd.DataFrame()  # the pairs of the last finished optimiser step
        self._step_betas = (self.beta, self.beta)  # β before and after it
        self._first_beta_state = self.beta_state()
        if self.args.sync_ref_model:
            require_keepable(self.accelerator, saves=self.args.save_strategy != SaveStrategy.NO)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        keep_results_in_float32(self.accelerator)

    @property
    def ref_model(self):
        """The reference, or None where it is the policy with its adapter off or exchanged."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model):
        # A property because TRL assigns the reference and prepares it in one go. What is sharded already it leaves
        # alone, and what is exposed already computes in the precision that accelerate prepares it for, as the policy.
        if model is not None and self._ref_model is None:
            require_separable_head(model)
            expose_hidden_states(model)
        self._ref_model = None if model is None else share_out_reference(model, self.accelerator)

    # ------------------------------------------------------------------------------------------------------------ data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first_row = next(iter(dataset))
        if "pair_index" not in first_row:
            dataset = number_rows(dataset)
        if not all(column in first_row for column in TOKENISED_COLUMNS):
            require_written_by_trl(dataset, first_row)
            if is_conversational(first_row) and writes_date(processing_class):
                logger.warning(
                    "the chat template writes today's date: the same run on another day, or its continuation, reads "
                    "other texts. Give rows chat_template_kwargs with the date (Llama 3: {'date_string': "
                    "'26 Jul 2024'}), or prepare the data with epsdpo.data.prepared.prepare"
                )
            rows = len(dataset) if isinstance(dataset, Dataset) else None
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            if rows is not None and len(dataset) < rows:
                logger.warning(
                    "%s data: %d of %d pairs dropped, because the prompt alone fills max_length=%s",
                    *(dataset_name, rows - len(dataset), rows, args.max_length),
                )
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "pair_index" not in self._signature_columns:
            self._signature_columns.append("pair_index")

    # ------------------------------------------------------------------------------------------------------------ loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and with them the number of its pairs."""
        batches, num_items_in_batch = super().get_batch_samples(
            (mark_repeats(batch, self.accelerator) for batch in epoch_iterator), num_batches, device
        )
        pairs = sum(int((batch["pair_index"] != REPEATED).sum()) for batch in batches)
        pairs = torch.tensor(pairs, device=self.accelerator.device)
        self._window_pairs = int(self.accelerator.reduce(pairs, reduction="sum"))
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            inputs = mark_repeats(inputs, self.accelerator)
        completion_mask = inputs["completion_mask"][:, 1:].bool()  # (2·pairs, sequence - 1): tokens that are predicted
        model_inputs = {key: inputs[key] for key in inputs if key not in ("completion_mask", "pair_index")}
        scores = self._score_completions(model, model_inputs, completion_mask)

        def per_token(values):  # (tokens,) -> (2·pairs, sequence - 1)
            return values.new_zeros(completion_mask.shape).masked_scatter(completion_mask, values)

        def per_sequence(values):  # (tokens,) -> (2·pairs,)
            return per_token(values).sum(dim=1)

        def by_side(name, values):  # (2·pairs,) -> the column `name` of both responses
            return dict(zip((name.format("chosen"), name.format("rejected")), values.chunk(2), strict=True))

        # Per token first: two sums of thousands of nats would leave few digits to their difference.
        chosen_log_ratios, rejected_log_ratios = per_sequence(scores.logps - scores.ref_logps).chunk(2)
        criterion = torch.stack([per_sequence(row) for row in scores.criterion])
        scored = ScoredPairs(
            pair_index=inputs["pair_index"],
            completion_mask=inputs["completion_mask"],
            token_logps=per_token(scores.logps),
            ref_token_logps=per_token(scores.ref_logps),
            log_ratio_margin=chosen_log_ratios - rejected_log_ratios,
            steps=pair_steps(criterion, self._arithmetic.criterion),
        )
        losses, beta = self.losses(scored)
        pairs = self._gather_pairs(
            scored.pair_index,
            {
                "loss": losses.where(~beta.isnan(), torch.nan),
                "decision": scored.steps,
                "beta": beta,
                **by_side("{}_logps", scored.token_logps.sum(dim=1)),
                **by_side("ref_{}_logps", scored.ref_token_logps.sum(dim=1)),
                **by_side("{}_tokens", completion_mask.sum(dim=1)),
                **by_side("{}_logits_sum", per_sequence(scores.mean_logits)),
                "chosen_top1": per_sequence(scores.is_top1.float()).chunk(2)[0],
                "entropy_sum": sum(per_sequence(scores.entropy).chunk(2)),
                "tokens": sum(inputs["attention_mask"].sum(dim=1).chunk(2)),
            },
        )
        self._require_finite(pairs)
        (self._window if self.model.training else self._evaluated).append(pairs)
        counted = losses[(inputs["pair_index"] != REPEATED) & ~beta.isnan()]
        if self.model.training and self._window_pairs is not None:
            # transformers divides by the number of micro-batches and averages over processes. So multiplied, their sum
            # is the mean over the pairs of the optimiser step, however they were dealt.
            loss = counted.sum() * (
                self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._window_pairs
            )
        else:
            loss = counted.sum() / max(1, len(counted))
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs)  # logits for `compute_metrics`, which the loss does not build

    def losses(self, scored: ScoredPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pair and the β̃ in it, both (pairs,); β̃ is NaN where a pair is left out of the loss."""
        beta = pair_beta(self.beta, scored.steps, self.args.epsilon_step)
        return dpo_loss(scored.log_ratio_margin, beta), beta

    def _score_completions(self, model, model_inputs, completion_mask) -> TokenScores:
        """One forward of the reference, then one of the policy that ends in the pass over both heads."""
        labels = model_inputs["input_ids"][:, 1:][completion_mask]

        def completion_tokens(hidden_states):
            # Prompt-learning adapters prepend virtual tokens; the real positions are the last ones.
            return hidden_states[:, :-1][:, -completion_mask.size(1) :][completion_mask]

        def keep(hidden_states, language_model):
            return completion_tokens(hidden_states), head_of(language_model)

        def score(hidden_states, language_model):
            hidden = completion_tokens(hidden_states)
            return score_tokens(
                hidden,
                head_of(language_model),
                ref_hidden.to(hidden.dtype),  # accelerate hands outputs of an autocast forward back in float32
                ref_head,
                labels,
                self.args.epsilon,
                self._arithmetic,
            )

        with torch.no_grad(), self._reference() as reference:
            ref_hidden, ref_head = reference(**model_inputs, on_hidden_states=keep)
        return model(**model_inputs, on_hidden_states=score)

    @property
    def _arithmetic(self):
        return ARITHMETICS[self.args.criterion_dtype]

    @contextlib.contextmanager
    def _reference(self):
        """The reference: a model of its own, or with PEFT the base model or TRL's frozen copy of the adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        peft_model = self.accelerator.unwrap_model(self.model)
        adapter = "ref" if "ref" in peft_model.peft_config else None
        with (
            use_adapter(peft_model, adapter_name=adapter),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            yield self.model

    # --------------------------------------------------------------------------------------------- metrics, β, record

    def _gather_pairs(self, pair_index: torch.Tensor, columns: dict[str, torch.Tensor]) -> pd.DataFrame:
        """The batch's pairs on all processes, without repeats, in the columns of `PAIR_COLUMNS`, each (pairs,)."""
        pairs = pair_table(*self.accelerator.gather((pair_index, stack_columns(columns))))
        return pairs[pairs["pair_index"] != REPEATED]

    def _require_finite(self, pairs: pd.DataFrame) -> None:
        broken = pairs[~np.isfinite(pairs["loss"]) & pairs["beta"].notna()]
        if len(broken):
            names = ", ".join(self._pair_ids.get(index, str(index)) for index in broken["pair_index"][:5])
            raise FloatingPointError(
                f"the loss of {len(broken)} of {len(pairs)} pairs is not finite after optimiser step "
                f"{self.state.global_step} (pairs {names}; β {self.beta:.6g}; policy log-probability of the first "
                f"chosen response {broken['chosen_logps'].iloc[0]:.6g} nats). Lower learning_rate or max_grad_norm, "
                "use bfloat16 in place of float16, and look at those pairs; the last checkpoint is unharmed"
            )

    def _log_pairs(self, pairs: pd.DataFrame, mode: str) -> None:
        """TRL's metrics and those of ε-DPO for all pairs of an optimiser step or an evaluation."""
        if mode == "train":
            self._total_train_tokens += int(pairs["tokens"].sum())
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, value in {**preference_metrics(pairs), **decision_metrics(pairs, self.beta)}.items():
            metrics[name].append(value)

    def trl_metrics(self, mode):
        return self._metrics[mode]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            pairs = pd.concat(self._evaluated, ignore_index=True)
            self._evaluated.clear()
            self._log_pairs(pairs, "eval")
            # transformers weighs the last, shorter batch as if it were whole.
            output.metrics[f"{metric_key_prefix}_loss"] = float(pairs["loss"].mean())
        return output

    def _forget_evaluation(self):
        super()._forget_evaluation()
        self._evaluated.clear()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # True on the last micro-batch of a window, also of a shorter one at the end of an epoch.
        if self.accelerator.sync_gradients:
            self._finish_window()
        return loss

    def _finish_window(self) -> None:
        """Move β by all pairs of the optimiser step, and keep them for the record."""
        pairs = pd.concat(self._window, ignore_index=True) if len(self._window) > 1 else self._window[0]
        self._window.clear()
        self._log_pairs(pairs, "train")
        before, self.beta = self.beta, self.next_beta(pairs)
        self._pairs_seen += len(pairs)
        self._step_pairs, self._step_betas = pairs, (before, self.beta)

    def next_beta(self, pairs: pd.DataFrame) -> float:
        """β after an optimiser step with these pairs, which have the columns of `PAIR_COLUMNS`."""
        return updated_beta(
            self.beta,
            relaxed=int((pairs["decision"] == 1).sum()),
            tightened=int((pairs["decision"] == -1).sum()),
            pairs=len(pairs),
            epsilon_step=self.args.epsilon_step,
            rule=self.args.beta_update,
        )

    def _record_step(self, step: int, epoch: float, seconds: float) -> None:
        pairs = self._step_pairs
        columns = {name: pairs[name].to_numpy() for name in PAIR_SCHEMA.names if name in pairs}
        for name in ("decision", "chosen_tokens", "rejected_tokens"):  # which came here as float32
            columns[name] = columns[name].astype("int64")
        columns |= {"step": np.full(len(pairs), step), "epoch": np.full(len(pairs), epoch, dtype="float64")}
        columns["pair_id"] = [self._pair_ids.get(index, str(index)) for index in pairs["pair_index"].tolist()]
        row = {"step": step, "epoch": epoch, **step_row(pairs, *self._step_betas)}
        row |= {"pairs_seen": self._pairs_seen, "seconds": seconds}
        self.record.append(row, columns)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def may_be_anothers(self, state):
        entry = get_entry(state.get("stateful_callbacks"))
        require_beta(state["global_step"], entry, self.args.beta, self.args.fresh_beta)
        return entry is None

    def require_same_layout(self, checkpoint, state):
        require_same_layout(checkpoint, get_entry(state.get("stateful_callbacks")), sharding_of(self.accelerator))

    def require_same_run(self, state):
        entry = get_entry(state.get("stateful_callbacks"))
        if entry is not None:
            require_same_run(state["global_step"], entry, self._first_beta_state, self._beta_settings())

    def add_to_checkpoint(self, checkpoint):
        self._put_beta_entry(self.state)
        if self.args.sync_ref_model:
            save_reference(self.ref_model, self.accelerator, checkpoint)

    def load_beside_the_policy(self, checkpoint):
        if self.args.sync_ref_model:
            load_reference(self.ref_model, self.accelerator, checkpoint)

    def _put_beta_entry(self, state: TrainerState) -> None:
        entry = {"settings": self._beta_settings(), "sharding": sharding_of(self.accelerator)}
        put_entry(state, {**self.beta_state(), **entry})

    def _beta_settings(self) -> dict[str, Any]:
        return {key: getattr(self.args, key) for key in self.kept_settings}

    def beta_state(self) -> dict[str, Any]:
        """What makes the next β, and must survive a checkpoint."""
        return {"beta": self.beta, "pairs_seen": self._pairs_seen}

    def set_beta_state(self, state: dict[str, Any]) -> None:
        self.beta, self._pairs_seen = state["beta"], state["pairs_seen"]

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call:  # the model file of a checkpoint, which only some kinds of checkpoint have
            super().save_model(output_dir, _internal_call)
            return
        with saved_whole(self.accelerator):
            super().save_model(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        gathered = state_dict is not None
        super()._save(output_dir, as_loaded(state_dict, self.model, self._loaded_dtypes) if gathered else None)
        if gathered and self.args.should_save and not is_peft_model(self.model):
            self.model.config.dtype = next(iter(self._loaded_dtypes.values()))  # it was set to that of the masters
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _restore_beta(self, state: TrainerState) -> None:
        """Take β from the checkpoint that `state` is of, or begin from the config at step 0."""
        self._window.clear()  # like TRL's metrics, of a training that was interrupted
        self._metrics["train"].clear()
        self.set_beta_state(self._first_beta_state)
        step = state.global_step
        if step:
            entry = get_entry(state.stateful_callbacks)
            if entry is None:
                logger.warning("step %d: going on with a fresh β of %g, as fresh_beta=True asks for", step, self.beta)
            else:
                self.set_beta_state(entry)
        self._put_beta_entry(state)  # so that a state says what run it is of, wherever and whenever it is saved


class _Bookkeeping(TrainerCallback):
    """Keeps β and its record in step with the training loop: restored at its start, written after every step."""

    def __init__(self, trainer: EpsilonDPOTrainer):
        self.trainer = trainer
        self.started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_beta(state)
        begin_sharded_training(self.trainer.model)
        if state.is_world_process_zero:
            self.trainer.begin_record(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.sync_ref_model:  # which TRL does when the step has ended
            reshard(self.trainer.ref_model)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer._record_step(state.global_step, state.epoch, time.perf_counter() - self.started)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.record.finish()
