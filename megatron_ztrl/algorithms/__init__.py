"""Advantages, losses and filters: pure functions of tensors and nouns, no I/O.

May import torch, ``megatron_ztrl.config`` and ``megatron_ztrl.types`` only.
"""
