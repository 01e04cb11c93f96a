"""Packaging. Tool settings are in pyproject.toml; the exact, tested environments are in requirements/.

The extras name what the code imports, loosely where a newer release is harmless. They are for people who
add megatron_ztrl to an environment of their own; `make env` and `make gpu-setup` install the pinned lists.
SGLang cannot be in the ``cpu`` extra, since its own requirements are CUDA packages: install it with
``pip install --no-deps -r requirements/sglang-cpu.txt``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_ztrl/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

# The executor's server; its client needs only what is installed always.
SANDBOX = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20", "pyseccomp>=0.1.2"]

TRAIN = [
    "torch==2.13.0",
    "megatron-core==0.16.1",
    "psutil>=7",
    "ray>=2.60,<3",
    "transformers==5.12.1",
    "safetensors>=0.8",
    "datasets>=5.2,<6",
    "math-verify==0.9.0",
    "tensorboard>=2.21",
    "matplotlib>=3.11",
]

setup(
    name="megatron_ztrl",
    version=VERSION,
    description="Reinforcement learning that teaches base language models to use Python for maths",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_ztrl", "megatron_ztrl.*"]),
        *find_packages("sandbox", include=["ztrl_sandbox", "ztrl_sandbox.*"]),
    ],
    package_dir={"megatron_ztrl": "megatron_ztrl", "ztrl_sandbox": "sandbox/ztrl_sandbox"},
    package_data={
        "megatron_ztrl": ["py.typed"],
        # Not packages of ours: they go on the path of a CPU engine, in place of what has no CPU build.
        "megatron_ztrl.engines.cpu_compat": ["standins/**/*"],
        "megatron_ztrl.observability.report": ["templates/*"],
        "ztrl_sandbox": ["py.typed"],
    },
    install_requires=[
        "numpy>=2",
        "aiohttp>=3.14",
        "omegaconf>=2.4,<3",
        "pydantic>=2.14,<3",
        "PyYAML>=6",
        "rich>=15",
        "Jinja2>=3.1",
    ],
    extras_require={
        "sandbox": SANDBOX,
        "cpu": [*TRAIN, *SANDBOX],
        "gpu": [*TRAIN, *SANDBOX, "sglang==0.5.21", "transformer-engine[core_cu13,pytorch]"],
        "dev": [
            "pytest>=9",
            "pytest-asyncio>=1.5",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "pytest-rerunfailures>=16.1",
            "ruff>=0.17",
            "import-linter>=2.16",
            "mypy>=2.4",
        ],
    },
    entry_points={
        "console_scripts": ["ztrl = megatron_ztrl.cli:main", "ztrl-sandbox = ztrl_sandbox.cli:main"],
    },
)
