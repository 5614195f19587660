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

# What else is needed, extras ("eval,wandb") included: this layer is made again when pyproject.toml changes, not when the sources do.
ARG EXTRAS=eval
WORKDIR /opt/treetune
COPY pyproject.toml ./
RUN python -c 'import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [name for name in sys.argv[1].split(",") if name]; \
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")' "${EXTRAS}" \
        > requirements.txt \
    && pip install --no-cache-dir --requirement requirements.txt

COPY README.md LICENSE ./
COPY core core
COPY ops ops
COPY models models
COPY losses losses
COPY cli cli
COPY examples examples
COPY docs docs
RUN pip install --no-cache-dir --no-deps .

# Models, data sets and compiled kernels lie in one folder, to be kept outside of the container. Whoever runs it (--user) may write there;
# USER is for libraries that ask for a name and find no such user.
ENV HOME=/cache USER=treetune HF_HOME=/cache/huggingface TREETUNE_HOME=/cache/treetune TRITON_CACHE_DIR=/cache/triton
RUN useradd --no-create-home --home-dir /cache --uid 1000 treetune && mkdir --mode 1777 /cache /work
USER 1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["treetune"]
CMD ["--help"]
