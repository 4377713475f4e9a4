"""The base of all networks, encoder, decoder and classifier, and the normalization that an encoder expects."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.models.encoders import Encoder


class Segmenter(nn.Module):
    """Encoder, decoder and classifier. Subclasses define `decode` and `classifier`.

    Args:
        encoder: Module from images [B,3,H,W] to taps, from the largest map to the smallest.
        align_corners: How features and logits are enlarged.

    Attributes:
        input: Applied to every image first; the identity, or a conversion from ImageNet's normalization.
        feature_channels: Channels of `features`.
        is_frozen: The encoder stays as it is: in evaluation mode, without gradients, nothing kept for a backward pass.
        recomputes: The encoder's activations are computed again in the backward pass.
    """

    feature_channels: int
    classifier: nn.Module

    def __init__(self, encoder: nn.Module, align_corners: bool) -> None:
        super().__init__()
        self.align_corners, self.is_frozen, self.recomputes = align_corners, False, False
        self.input = nn.Identity()
        self.encoder = encoder

    def freeze_encoder(self) -> None:
        """Keep the encoder's weights and statistics as they are from now on, in training mode too."""
        self.is_frozen = True
        self.encoder.requires_grad_(False).eval()

    def checkpoint_encoder(self) -> None:
        """Compute the encoder's activations again in the backward pass instead of keeping them.

        Raises:
            UserError: timm cannot do so for this encoder.
        """
        self.recomputes = True
        body = self.encoder.body if isinstance(self.encoder, Encoder) else self.encoder
        try:
            body.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise UserError("model.grad_checkpointing: timm does not offer it for this model.backbone") from None

    def hold_statistics(self) -> None:
        """Let batch norms of the encoder ignore images that pass a second time, in the backward pass.

        Called after batch norms are converted for several processes, which drops hooks.
        """
        for module in self.encoder.modules() if self.recomputes else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(_stop_statistics)
                # Also called where the recomputation ends inside the norm, which it does by an exception.
                restore = partial(_restore_statistics, momentum=module.momentum)
                module.register_forward_hook(restore, always_call=True)

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the mode of all modules; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            self.encoder.eval()
        return self

    def encode(self, image: Tensor) -> list[Tensor]:
        """[B,3,H,W], normalized for ImageNet -> the encoder's taps [B,C,h,w]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return list(self.encoder(self.input(image)))

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        """Taps of `encode` -> input of the classifier, and of a paper's own heads, [B,feature_channels,h,w]."""
        raise NotImplementedError

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized for ImageNet -> input of the classifier [B,feature_channels,h,w]."""
        return self.decode(self.encode(image))

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized for ImageNet -> logits [B,num_classes,h,w]."""
        return self.classifier(self.features(image))


def _is_backward() -> bool:
    # The only sign of a recomputation in autograd; FSDP of PyTorch reads it too.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _stop_statistics(norm: nn.Module, _: tuple) -> None:
    if _is_backward():
        norm.momentum = 0.0


def _restore_statistics(norm: nn.Module, _: tuple, __: Tensor, momentum: float) -> None:
    if _is_backward() and norm.training:
        norm.momentum = momentum
        norm.num_batches_tracked -= 1


class InputNormalization(nn.Module):
    """Convert images normalized for ImageNet, which every network receives, to what other pretrained weights need.

    Args:
        mean: Mean of red, green and blue (0 to 255). It is subtracted and the result divided by 255.
        bgr: Return the channels in the order blue, green, red.
        std: Standard deviation of red, green and blue (0 to 255), which divides the result; None for no division.
    """

    def __init__(self, mean: Sequence[float], bgr: bool = False, std: Sequence[float] | None = None) -> None:
        super().__init__()
        imagenet_mean, scale = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        shift = imagenet_mean - torch.tensor(mean).view(3, 1, 1) / 255
        if std is not None:
            deviation = torch.tensor(std).view(3, 1, 1) / 255
            scale, shift = scale / deviation, shift / deviation
        self.bgr = bgr
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,3,H,W]."""
        image = image * self.scale + self.shift
        return image.flip(1) if self.bgr else image
