"""Reinforcement learning that teaches base language models to use Python while they solve maths.

Importing this package is cheap: torch, ray, megatron and sglang are imported only by the modules that
drive them (see the import layers in pyproject.toml).
"""

__version__ = "0.1.0"
