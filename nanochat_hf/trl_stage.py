"""What the stages built on TRL's trainers share: the starting model, the optimizer, resuming, the folder they write.

TRL owns the loop; the optimizer's groups, the schedule and everything written to the run's folder are ours.
"""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import atomic_folder, load_model, save_model
from .hardware import supports_bf16
from .optim import build_optimizer, warmdown_lambda
from .recipe import nearest
from .stage import STAGES, Stage
from .tokenizer import encode_conversation, special_ids
from .trl_callbacks import CurveCallback

# A recipe that sets what its optimizer does not read expects what will not happen.
WITHOUT_EFFECT = {
    "muon": ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args"),
    "adamw": ("lr_fraction", "learning_rates", "warmdown_fraction", "final_lr_fraction"),
}
NUM_PROBES = 8  # conversations that tell a chat model from a base model
# Times the nats of a guess. A base model has only ever pushed the chat tokens down: the tiny recipe's takes 12.5 nats
# where a guess takes 8.3, and after midtraining 0.02.
MAX_END_NATS = 1.25


def load_start(run_dir: str, start_from: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The starting model, in fp32 whatever it was saved in (master weights), and its tokenizer.

    Args:
        start_from: a stage of this run, a model folder or a Hub id.

    Raises:
        ValueError: a stage that has not been made, or neither a stage nor a folder nor the form of a Hub id; a
            tokenizer without the chat tokens.
    """
    if start_from in STAGES:
        folder = Path(run_dir) / start_from
        if not (folder / "config.json").is_file():
            raise ValueError(f"start_from={start_from}: {folder} holds no model yet; run the {start_from} stage first")
        return load_model(folder)
    if not Path(start_from).is_dir() and start_from.count("/") != 1:
        raise ValueError(
            f"start_from={start_from!r} is no stage ({', '.join(STAGES)}), no folder and no Hub id (owner/name); "
            f"did you mean {nearest(start_from, STAGES)}?"
        )
    return load_model(start_from)


@torch.no_grad()
def refuse_base_model(model: PreTrainedModel, tokenizer, conversations: list[list[dict]], start_from: str) -> None:
    """Stop before a stage that only a chat model can take: one that has learned to end its turn.

    Args:
        conversations: a few finished ones; the model is asked how likely it finds `<|assistant_end|>` after each.

    Raises:
        ValueError: less likely than a guess.
    """
    end = special_ids(tokenizer)["<|assistant_end|>"]
    nats = []
    for messages in conversations[:NUM_PROBES]:
        ids = torch.tensor([encode_conversation(tokenizer, messages)[0]], device=model.device)
        assert ids[0, -1] == end
        logits = model(input_ids=ids[:, :-1], logits_to_keep=1, use_cache=False).logits[0, -1]
        nats.append(-logits.float().log_softmax(-1)[end].item())
    mean, guess = sum(nats) / len(nats), math.log(len(tokenizer))
    if mean > MAX_END_NATS * guess:
        raise ValueError(
            f"start_from={start_from} is a base model, and this stage needs a chat model: ending its turn costs it "
            f"{mean:.1f} nats, a guess {guess:.1f}. Run midtraining or SFT first and start from there"
        )


def prepare_arguments(config, training_args, settings: dict, checkpoint_dir: Path) -> None:
    """Fill in what recipes leave to us: where checkpoints go, and fp32 on a CPU without bf16.

    Raises:
        ValueError: a setting that would have no effect here.
    """
    for name in WITHOUT_EFFECT[config.optimizer]:
        if name in settings:
            raise ValueError(
                f"`{name}` has no effect with `optimizer: muon`: rates and schedule follow from the architecture; "
                f"scale them with `lr_fraction`, shape them with `warmup_steps`, `warmdown_fraction` and "
                f"`final_lr_fraction`"
                if config.optimizer == "muon"
                else f"`{name}` has no effect with `optimizer: adamw`: say `learning_rate` and `lr_scheduler_type`"
            )
    if config.total_batch_rows:
        set_accumulation(config.total_batch_rows, training_args, settings)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    # TRL 1.16 reads the old name of `activation_checkpointing`, transformers 5.23 warns of it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    training_args.output_dir = str(checkpoint_dir)
    training_args.push_to_hub = False  # the script publishes after the stage, checked and with its card
    training_args.logging_nan_inf_filter = False  # it would hide a NaN behind the mean of earlier losses
    if training_args.bf16 and training_args.use_cpu and not supports_bf16(torch.device("cpu")):
        print("this CPU is slow in bf16: training in fp32", file=sys.stderr)
        training_args.bf16, training_args.mixed_precision = False, "no"


def set_accumulation(total_batch_rows: int, training_args, settings: dict) -> None:
    """Let `gradient_accumulation_steps` follow from a step's rows.

    Raises:
        ValueError: both are set, or the processes cannot share the rows out evenly.
    """
    if "gradient_accumulation_steps" in settings:
        raise ValueError("gradient_accumulation_steps follows from total_batch_rows: leave one of them out")
    at_once = training_args.per_device_train_batch_size * training_args.world_size
    if total_batch_rows % at_once:
        raise ValueError(
            f"total_batch_rows={total_batch_rows} is no multiple of {at_once}, the rows taken at once: "
            f"per_device_train_batch_size {training_args.per_device_train_batch_size} on {training_args.world_size} "
            f"processes"
        )
    training_args.gradient_accumulation_steps = total_batch_rows // at_once
    if hasattr(training_args, "steps_per_generation"):  # RL: a rollout is used for one step
        training_args.steps_per_generation = training_args.gradient_accumulation_steps
        training_args.generation_batch_size = total_batch_rows


class StageOptimizer:
    """Put before a TRL trainer in the bases: the recipe's optimizer and schedule instead of the trainer's.

    Args:
        config: the stage's own settings.
    """

    def __init__(self, config, **kwargs):
        self.stage_config = config
        super().__init__(**kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.stage_config.optimizer == "adamw":
            return super().create_optimizer(model)
        if not hasattr(self.model.config, "architecture"):
            raise ValueError(
                f"`optimizer: muon` knows the parameters of this project's models, not those of "
                f"{self.model.config.model_type}; set `optimizer: adamw` with a `learning_rate`"
            )
        # Muon decays only in pretraining.
        self.optimizer = build_optimizer(
            model or self.model,
            lr_fraction=self.stage_config.lr_fraction,
            weight_decay=0.0,
            learning_rates=self.stage_config.learning_rates,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.stage_config.optimizer == "adamw":
            return super().create_scheduler(num_training_steps, optimizer)
        config, warmup_steps = self.stage_config, self.args.get_warmup_steps(num_training_steps)
        factor = warmdown_lambda(num_training_steps, warmup_steps, config.warmdown_fraction, config.final_lr_fraction)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        return self.lr_scheduler


def lora_config(config):
    """The recipe's `peft:` as a `peft.LoraConfig`, None without one.

    Raises:
        ValueError: a setting that LoraConfig has not, or an adapter on the head.
    """
    if config.peft is None:
        return None
    from peft import LoraConfig

    fields = LoraConfig.__dataclass_fields__
    for name in config.peft:
        if name not in fields:
            raise ValueError(f"peft: LoraConfig has no setting `{name}`; did you mean `{nearest(name, fields)}`?")
    settings = {"task_type": "CAUSAL_LM", **config.peft}
    if "lm_head" in (settings.get("target_modules") or ()):
        raise ValueError(
            "peft: the losses read lm_head's own weight and would pass an adapter on it by; train the head whole "
            "instead: modules_to_save: [lm_head]"
        )
    return LoraConfig(**settings)


def train_stage(trainer, stage: Stage, figure: str, *callbacks: TrainerCallback) -> dict:
    """Train, from this stage's newest whole checkpoint if it was interrupted.

    Args:
        figure: what the progress bar shows and every line of the curve has: `loss`, `reward`.
        callbacks: more of them, called after the curve's own.

    Returns:
        What every record has: steps, tokens, this session's seconds (of steps alone) and tokens a second, processes,
        precision, and the learning rate of each optimizer group.
    """
    curve = CurveCallback(stage, figure)
    for printing in (ProgressCallback, PrinterCallback):  # they would print every log line
        trainer.remove_callback(printing)
    for callback in (curve, *callbacks):
        trainer.add_callback(callback)
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        print(f"{stage.name}: resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    tokens = int(trainer.state.num_input_tokens_seen)
    return {
        "num_steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": (tokens - curve.tokens_before) / curve.seconds,
        "training_seconds": curve.seconds,
        "world_size": trainer.args.world_size,
        "dtype": "bfloat16" if trainer.args.bf16 else "float32",
        "learning_rates": {group.get("name", "all"): group["initial_lr"] for group in trainer.optimizer.param_groups},
    }


def newest_checkpoint(folder: str | Path) -> str | None:
    """The Trainer's newest checkpoint; one that a kill left half-written is deleted, with a line that says so.

    The Trainer writes a checkpoint's files in place, `trainer_state.json` last.
    """
    while Path(folder).is_dir() and (checkpoint := get_last_checkpoint(folder)):
        try:
            json.loads((Path(checkpoint) / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            print(f"{checkpoint} is not whole (the run was killed while writing it): deleted", file=sys.stderr)
            shutil.rmtree(checkpoint)
    return None


def save_stage(trainer, tokenizer, run_dir: str, name: str) -> None:
    """Write the stage's model folder and drop its checkpoints. An adapter is merged, and kept in `adapter/` as well."""
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        with atomic_folder(Path(run_dir) / name) as partial:
            if hasattr(model, "merge_and_unload"):
                for settings in model.peft_config.values():  # not where the model lies on this machine
                    settings.base_model_name_or_path = trainer.stage_config.start_from
                model.save_pretrained(partial / "adapter")
                (partial / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty card, with that path
                model = model.merge_and_unload()
            save_model(model, tokenizer, partial)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
