"""See the package docstring."""

from cpu_standin import missing_functions

from torchvision.transforms import InterpolationMode, functional

__all__ = ["InterpolationMode", "functional"]
__getattr__ = missing_functions(__name__)
