"""All of SGLang is behind this package: the server process, its HTTP API, how weights reach its parameters.

The server is the stock ``python -m sglang.launch_server`` of the pinned release. Nothing here imports
``sglang``; ``weight_receiver`` is imported *by* the server, inside each of its tensor-parallel ranks.
"""
