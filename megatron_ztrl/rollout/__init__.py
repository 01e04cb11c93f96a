"""Rollouts: one trajectory, the siblings of a prompt (`group`), who may start when (`scheduler`) and on which engine
(`fleet`), and what survives the driver (`journal`).

May import ``engines``, ``envs``, ``algorithms``, ``observability``, ``config`` and ``types``; nothing heavy.
"""
