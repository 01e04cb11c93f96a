"""From problem files to prompts, and from rollouts to packed batches.

May import numpy, ``megatron_ztrl.config`` and ``megatron_ztrl.types``; Hugging Face ``datasets`` only lazily.
"""
