"""See the package docstring."""

from cpu_standin import missing_functions

from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode"]
__getattr__ = missing_functions(__name__)
