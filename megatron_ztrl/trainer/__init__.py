"""Megatron-core behind ``actor.ActorRank`` and ``critic.CriticRank``: passes, optimizer steps, checkpoints, export.

``topology`` checks a configuration without Megatron; every other module imports it. May import
``weights``, ``algorithms``, ``data.packing``, ``config`` and ``types``.

Shape suffixes used here: ``T`` packed tokens of a microbatch, ``N`` of those the trained ones, ``V``
vocabulary entries of this tensor-parallel rank, ``H`` hidden size, ``S`` sequences, ``B`` sequences of one
padded block, ``L`` its longest sequence, ``A`` attention heads, ``D`` head size.
"""
