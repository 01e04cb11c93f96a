"""What surrounds the policy: prompt templates, and the tool-interrupt state machine that runs its code.

May import ``megatron_ztrl.config`` and ``megatron_ztrl.types``; nothing heavy.
"""
