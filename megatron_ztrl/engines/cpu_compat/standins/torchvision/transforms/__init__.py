"""See the package docstring."""

import enum

from cpu_standin import missing_functions


class InterpolationMode(enum.Enum):
    """The names that processors mention in their defaults."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from torchvision.transforms import functional  # noqa: E402  (needs InterpolationMode)

__all__ = ["InterpolationMode", "functional"]
__getattr__ = missing_functions(__name__)
