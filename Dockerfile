# syntax=docker/dockerfile:1
# CPU:  docker build -t nr-serve --build-arg BASE=ubuntu:24.04 \
#           --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=... .
# GPU:  docker build -t nr-serve .
# Run:  docker run -p 8000:8000 -e NR_API_KEY=... nr-serve     (others can reach it: it does not start without a key)
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# The wheels bring their own CUDA libraries; for a CPU image ask for a CPU build, and name the index that has it.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/nr-serve && /opt/nr-serve/bin/pip install --no-cache-dir "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nr_serve ./nr_serve
RUN /opt/nr-serve/bin/pip install --no-cache-dir '.[otel]'

FROM ${BASE}
# g++ compiles operators for the processor it meets: nr-serve's own on a CPU, Triton's launchers on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nr \
    && install --directory --owner nr /cache /adapters
COPY --from=build /opt/nr-serve /opt/nr-serve
ENV PATH=/opt/nr-serve/bin:$PATH \
    NR_CACHE=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    NR_HOST=0.0.0.0 \
    NR_PORT=8000 \
    PYTHONUNBUFFERED=1
USER nr
WORKDIR /home/nr
VOLUME ["/cache", "/adapters"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health' % os.environ['NR_PORT'], timeout=2)"]
ENTRYPOINT ["nr-serve"]
CMD ["serve"]
