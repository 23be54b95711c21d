"""What an image classifier takes: pictures' form, and how many places the part before its layers makes of one."""

from typing import Any

from torch import nn

# Where a config does not say.
SIZE, CHANNELS = 224, 3


def picture_shape(config: Any) -> tuple[int, int, int]:
    """(C, H, W) of the pictures that a config is made for."""
    size = getattr(config, "image_size", None) or SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return channels(config), int(height), int(width)


def channels(config: Any) -> int:
    """How many channels a picture has."""
    return int(getattr(config, "num_channels", None) or CHANNELS)


def hidden_form(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Places and features that the first convolution makes of a picture: an upper bound, or nearly, of what follows."""
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None:
        return height * width, channels(model.config)
    count = 1
    for size, kernel, stride in zip((height, width), first.kernel_size, first.stride, strict=True):
        count *= max(1, (size - kernel) // stride + 1)
    return count, first.out_channels
