"""A standalone executor for model-written Python: warm forked interpreters behind HTTP.

Process tree, top down::

    server   (server.py, app.py, pool.py, sessions.py)
                                        asyncio: HTTP, queue, output capture; never runs a snippet
    zygote   (zygote.py)                imports the preload set once, forks workers; holds no request data
    worker   (worker.py)                one slot: arms, times, limits and kills one snippet at a time
    snippet  (harness.py, isolation.py) single use: isolates itself, then waits for its code

The trainer talks to it through :mod:`ztrl_sandbox.client` and starts it through
:mod:`ztrl_sandbox.process`. Nothing here imports ``megatron_ztrl``. This module stays empty so that
the zygote loads neither FastAPI nor aiohttp.
"""

__version__ = "0.1.0"
