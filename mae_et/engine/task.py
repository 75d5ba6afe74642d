"""What the trainer asks of a task: the model, its loss, its preprocessing, and what runs beside the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae_et.data.buffers import Batch
from mae_et.engine.loggers import Loggers
from mae_et.models.sizes import Size


class Hook(Protocol):
    """Work beside the training: an accuracy, pictures. All processes take part in it.

    `due` gets the number of steps done; the trainer asks it before the first step and after each step.
    The call returns scalars for the metrics. `writer` takes pictures on the main process and is None on the others.
    """

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]: ...


class Task(ABC):
    """A model and how it learns.

    Attributes:
        model: on the device of this process. A checkpoint holds its state.
        ema: a moving average of the model's weights, updated after each step and saved; None: no average.
        hooks: run by the trainer when they are due.
        step: number of the step in progress, from 0; the trainer sets it.
    """

    model: nn.Module
    ema: ModelEmaV3 | None = None
    hooks: Sequence[Hook] = ()
    step: int = 0

    @abstractmethod
    def preprocess(self, images: Tensor, size: Size) -> Tensor:
        """Turns a micro batch into the model's input.

        Args:
            images: [n, C, H, W] or [n, C, h, w] uint8, on the device.
            size: (h, w) in px, of the stage.
        Returns:
            [n, C, h, w] float32, normalized.
        """

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of a micro batch.

        Args:
            model: the model as wrapped for several processes. Call it; do not reach into it.
            images: as from `preprocess`.
            batch: labels and places in the stream, on the device.
        Returns:
            The loss, a scalar that is a mean over the images, and further scalars to log.
        """

    def parameters_to_clip(self) -> list[nn.Parameter]:
        """Returns the parameters whose gradient norm is measured and clipped."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def enter_step(self, step: int) -> bool:
        """Chooses what a step trains; called before it.

        Args:
            step: number of the step, from 0.
        Returns:
            Whether other parameters require gradients from now on. The trainer then wraps the model again. False here.
        """
        return False

    def enter_bandwidth(self, size: Size, optimizer: torch.optim.Optimizer) -> bool:
        """Adapts the model and the optimizer's state to a new input size; called before the first step at it.

        Args:
            size: (h, w) in px, of the inputs from now on.
            optimizer: of the model's parameters.
        Returns:
            Whether parameters were replaced. The trainer then wraps the model again. False here: the model takes any size.
        """
        return False
