"""``ztrl plan``: what a configuration takes on GPUs that are not here yet, and which layout would be better.

``states`` counts weights, gradients and optimizer state exactly, from the real model on the meta device. The
rest is arithmetic on shapes, without Megatron: ``activations`` (checked against measured peaks by
``benchmarks/activation_memory.py``), ``engine`` (weights, KV cache, publish), ``step_time`` (from stated
hardware numbers), ``layouts`` (the search), ``plan`` (all of it together) and ``table``.
"""
