# vlm_sapo with vLLM, for NVIDIA GPUs. docs/install.md says how to build and run it, and what of it was tried.
# The "devel" image: FlashInfer and Triton compile kernels when they first run. CUDA 13.0 is that of vLLM's torch.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008  # the distribution keeps no older versions that could be named
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    UV_LINK_MODE=copy
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir "uv>=0.9,<1"

# What the package needs, in a layer of its own: a change of the package's code doesn't fetch it again.
WORKDIR /src
COPY pyproject.toml ./
RUN uv pip install --no-cache --requirements pyproject.toml --extra vllm --extra quantized --extra fused --extra trackers
COPY README.md LICENSE ./
COPY vlm_sapo vlm_sapo
COPY configs configs
COPY data data
COPY eval eval
RUN uv pip install --no-cache --no-deps . && rm -rf /src

# Models and compiled kernels stay in the volume. Both folders are writable for any user, so that
# `docker run --user` can give files in a mounted folder their owner; USER is what torch calls a user without a name.
RUN useradd --create-home --uid 10001 trainer && install --directory --mode 1777 /cache /cache/huggingface /work
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    USER=trainer
USER 10001
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["vlm-sapo"]
CMD ["--help"]
