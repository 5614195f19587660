# treetune, with torch for CUDA or, with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu, for processors: docs/install.md
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Triton compiles what launches its kernels when they first run, so it needs a C compiler in the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch comes first: it is large and seldom changes. Its versions are those of pyproject.toml.
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple "torch>=2.10,<2.14"

ARG EXTRAS=eval
WORKDIR /opt/treetune
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY ops ops
COPY models models
COPY losses losses
COPY cli cli
COPY examples examples
COPY docs docs
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]"

# Models, data sets and compiled kernels lie in one folder, to be kept outside of the container.
ENV HF_HOME=/cache/huggingface TREETUNE_HOME=/cache/treetune TRITON_CACHE_DIR=/cache/triton
RUN useradd --create-home --uid 1000 treetune && install --directory --owner treetune /cache /work
USER 1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["treetune"]
CMD ["--help"]
