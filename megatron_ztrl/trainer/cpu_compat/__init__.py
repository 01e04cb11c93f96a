"""What megatron-core needs, and a machine without CUDA lacks.

* ``cuda_calls``: sends Megatron's hard-coded ``torch.cuda`` calls to the CPU. ``install()`` does nothing
  where CUDA is available.
* ``attention``, ``norm``: packed attention and RMSNorm in plain torch, for Megatron's local layer spec. They
  run on any device.

Megatron's own files stay as they were released.
"""
