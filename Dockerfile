# The environment for NVIDIA H100 machines, one node or a cluster.
#
#   NOT YET RUN ON A GPU. Written from the documented requirements of the releases in requirements/gpu*.txt.
#
#   docker build -t megatron_ztrl .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -it megatron_ztrl ztrl doctor
#
# The NGC image gives Python 3.12, the CUDA 13 toolkit, cuDNN and NCCL headers, and the InfiniBand and UCX
# libraries. Its own torch, Transformer Engine and apex are NOT used: SGLang's kernels are built for the torch on
# PyPI, so that torch goes into a virtual environment of its own, and Transformer Engine is compiled against it.
# Apex is not needed: with Transformer Engine there, megatron-core takes its fused Adam from it.
FROM nvcr.io/nvidia/pytorch:25.10-py3

# The image pins its own packages for every pip; inside our environment these pins would contradict ours.
ENV PIP_CONSTRAINT= \
    PIP_NO_CACHE_DIR=1

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron_ztrl

# First what changes rarely, so that an edit of the sources does not compile Transformer Engine again.
COPY requirements requirements
COPY tools/make_env.py tools/env_state.py tools/
COPY setup.py pyproject.toml Makefile ./
COPY megatron_ztrl/__init__.py megatron_ztrl/__init__.py
COPY sandbox/ztrl_sandbox/__init__.py sandbox/ztrl_sandbox/__init__.py

# 9.0 is Hopper. Each compile job takes several gigabytes of memory.
ENV NVTE_FRAMEWORK=pytorch \
    NVTE_CUDA_ARCHS=90 \
    MAX_JOBS=8
RUN make gpu-setup PYTHON=python3.12

COPY . .

ENV PATH=/opt/megatron_ztrl/.venv/bin:$PATH

CMD ["ztrl", "--help"]
