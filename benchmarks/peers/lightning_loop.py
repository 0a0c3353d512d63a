"""Peer: Lightning at its best: normalised images in memory, no logger, no checkpoints, no progress bar.

    python benchmarks/peers/lightning_loop.py MODEL FOLDER [--batch 64] [--precision bf16] [--steps 200]

The batches are cut out of one tensor of normalised images by a batch sampler, without worker processes and
without collating single samples. It needs an environment with `lightning`.
"""

import logging
import warnings

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from training import Clock, arguments, images_and_labels, network, normalised, optimizer


class Classifier(lightning.LightningModule):
    """The network with its loss and optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer_name: str) -> None:
        super().__init__()
        self.model, self.optimizer_name = model, optimizer_name

    def training_step(self, batch, index: int):
        """Returns the loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        """Returns the optimizer."""
        return optimizer(self.optimizer_name, self.model)


class Timer(lightning.Callback):
    """Ends the training when the clock has run."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        """Counts the step."""
        trainer.should_stop = self.clock.step()


def main() -> None:
    options = arguments(__doc__).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    images, labels, mean, std = images_and_labels(options.data)
    model = network(options.model, images)
    inputs = normalised(images, mean, std)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    else:
        inputs = inputs.contiguous()
    dataset = TensorDataset(inputs, labels)
    sampler = BatchSampler(RandomSampler(dataset), options.batch, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=0)
    clock = Clock(options.warmup, options.steps, options.device)
    trainer = lightning.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Timer(clock)],
    )
    trainer.fit(Classifier(model, options.optimizer), loader)
    clock.report(lightning=lightning.__version__)


if __name__ == "__main__":
    main()
