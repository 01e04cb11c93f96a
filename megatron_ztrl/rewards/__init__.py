"""Outcome rewards: was the task solved, 0 or 1.

May import ``megatron_ztrl.config`` and ``megatron_ztrl.types``; math-verify only in its own processes.
"""
