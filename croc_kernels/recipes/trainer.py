"""transformers' Trainer for the token-reconstruction stage: both losses, right scaling, whole
checkpoints.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..layer import CrocLayer
from .checkpoints import publish, rotate, staging_path
from .data import IMAGE_LENGTHS, NOTES
from .records import SampleReport

logger = logging.getLogger("croc_kernels")
LOSSES = ("caption_loss", "reconstruction_loss")
REPORT_FILE = "samples_report.json"


class _LogBeforeSave(TrainerCallback):
    """Log whenever a checkpoint is saved: a resumed run has no half of an interval's losses to go
    on with.
    """

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        return control


class _Progress(ProgressCallback):
    """The progress bar with the last logged losses at its end, instead of a printed dictionary per
    step.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {
                name.removesuffix("_loss"): f"{logs[name]:.3f}" for name in LOSSES if name in logs
            }
            self.training_bar.set_postfix(shown, refresh=False)


class StageTrainer(Trainer):
    """Trainer of a model with an attached :class:`~croc_kernels.CrocLayer`.

    Both losses are means over the tokens of the whole optimizer step, whatever its number of
    micro-batches and ranks: the trainer counts the tokens of all of them beforehand.
    ``caption_loss`` and ``reconstruction_loss`` (unweighted) are logged beside ``loss``.

    To go on from a checkpoint, give a ``model`` that was loaded from it.

    Args:
        layer: the attached layer.
        report: gets a note per sample that was left out or cut.
        lr_of: parameter -> learning rate, for parameters that don't use ``args.learning_rate``.
        **kwargs: of Trainer. Batches come from :class:`~.data.Collator`.

    Raises:
        RuntimeError: the model takes no loss arguments, or several GPUs are driven by one process.
    """

    def __init__(
        self,
        *,
        layer: CrocLayer,
        report: SampleReport,
        lr_of: dict[nn.Parameter, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer, self.report, self.lr_of = layer, report, lr_of or {}
        # Both losses since the last log, on the device, and how many optimizer steps they add up.
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._staged: Path | None = None
        if not self.model_accepts_loss_kwargs:
            raise RuntimeError(
                "StageTrainer: model must accept num_items_in_batch, or gradient accumulation "
                f"would scale the losses wrongly; got {type(self.model).__name__}"
            )
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"StageTrainer: one process must drive one GPU, got {self.args.n_gpu}; start with "
                "torchrun"
            )
        if self.args.device.type == "cpu":
            # Several CPU ranks call it "cpu:0", where Trainer can't load an optimizer's state to.
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        self.add_callback(_LogBeforeSave)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Fetch one optimizer step's micro-batches and count the tokens of both losses over all of
        them.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += bool(batches)
        lengths: list[int] = []
        for batch in batches:
            lengths += batch.pop(IMAGE_LENGTHS)
            for note in batch.pop(NOTES):
                self._report(note)
        num_masked: int | Tensor = self.layer.num_loss_tokens(lengths)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            num_masked = self.accelerator.gather(torch.tensor(num_masked, device=device)).sum()
        for batch in batches:
            batch["num_masked_in_batch"] = num_masked
        return batches, num_items

    def _report(self, note: Any) -> None:
        if self.report.add(note):
            logger.warning(
                "%s: record %d (%s): %s",
                self.report.data_file,
                note.index,
                note.kind,
                note.reason,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; both of its parts are added up on the device until the next log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in LOSSES:
                value = outputs[name].detach().float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add both losses, as means over the steps since the last log; the one place that reads
        them.
        """
        if "loss" in logs and self._sums:
            for name, value in self._sums.items():
                ranks = self.accelerator.gather(value.reshape(1))
                # Each rank holds its part of a mean over all ranks' tokens, or else the mean over
                # its own.
                whole = ranks.sum() if self.args.average_tokens_across_devices else ranks.mean()
                logs[name] = whole.item() / self._steps
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the parameters of ``lr_of`` in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in list(optimizer.param_groups) if fresh and self.lr_of else ():
            options = {key: value for key, value in group.items() if key != "params"}
            for lr in sorted(set(self.lr_of.values())):
                chosen = [p for p in group["params"] if self.lr_of.get(p) == lr]
                if chosen:
                    group["params"] = [p for p in group["params"] if self.lr_of.get(p) != lr]
                    optimizer.add_param_group({**options, "params": chosen, "lr": lr})
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staged) if self._staged else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"

        def write(folder: Path) -> None:
            self._staged = folder
            try:
                super(StageTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._staged = None
            if self.args.should_save:
                self.report.save(folder / final.name / REPORT_FILE)

        self._write(final, write, inner=final.name)
        if self.args.should_save:
            rotate(output, self.args.save_total_limit)

    def save_final(self, directory: Path) -> None:
        """Save model and processor as ``directory``, whole or not at all."""
        self._write(directory, lambda folder: self.save_model(str(folder), _internal_call=True))

    def _write(self, final: Path, write: Callable[[Path], None], inner: str = "") -> None:
        """Have all ranks write into a directory beside ``final``, then let one of them rename
        it.
        """
        staged = staging_path(final)
        if self.args.should_save:
            staged.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        write(staged)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(staged / inner, final)
            if inner:
                staged.rmdir()
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights of a plain model are there already: it was made from the checkpoint.

        transformers 5 saves a LLaVA's weights under other names than the model has in memory, and
        Trainer (5.17) reads them back by name: none fits, it only warns, and training goes on from
        the weights it started with.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def resume_report(self, checkpoint: Path) -> None:
        """Take over the notes that a checkpoint was saved with."""
        if (checkpoint / REPORT_FILE).is_file():
            self.report.load(checkpoint / REPORT_FILE)
