"""What an image classifier takes: pictures' form, and how many places the part before its layers makes of one."""

from typing import Any

from torch import nn

from trimcli.errors import InputError

# Where a config does not say; and beyond what no picture is.
SIZE, CHANNELS = 224, 3
LARGEST = 8192


def picture_shape(config: Any) -> tuple[int, int, int]:
    """(C, H, W) of the pictures that a config is made for. Raises InputError for what is no size."""
    size = getattr(config, "image_size", None) or SIZE
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= LARGEST for side in sides):
        raise InputError(f"the model's config.json says image_size {size!r:.40}, which no picture has; fetch it anew.")
    return channels(config), sides[0], sides[1]


def channels(config: Any) -> int:
    """How many channels a picture has. Raises InputError for what is no count."""
    found = getattr(config, "num_channels", None) or CHANNELS
    if not isinstance(found, int) or not 0 < found <= LARGEST:
        raise InputError(f"the model's config.json says num_channels {found!r:.40}, which no picture has.")
    return found


def hidden_form(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Places and features that the first convolution makes of a picture: an upper bound, or nearly, of what follows."""
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None:
        return height * width, channels(model.config)
    count = 1
    for size, kernel, stride in zip((height, width), first.kernel_size, first.stride, strict=True):
        count *= max(1, (size - kernel) // stride + 1)
    return count, first.out_channels
