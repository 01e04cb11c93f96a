"""CPU stand-in for ``torchvision``: SGLang imports it for image processors, which text models never call.

The real package on PyPI is built for CUDA, and beside a CPU torch it breaks ``import transformers``.
"""

from torchvision import io, transforms

__version__ = "0.0.0+cpu"
__all__ = ["io", "transforms"]
