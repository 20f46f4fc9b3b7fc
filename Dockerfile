# The kit on a CPU, set up for a user who is not root:
#   docker build --tag epsdpo . && docker run --rm epsdpo make demo
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL (--build-arg) are addresses of package indexes, pip's own default without them.
# On x86-64 name as the second the address that pytorch.org has for builds of torch for CPUs: without it the image gets
# the build for CUDA, which is several GB larger.
FROM python:3.11-slim-bookworm AS tools
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 kit && install --directory --owner=kit --group=kit /home/kit/epsdpo
USER kit
WORKDIR /home/kit/epsdpo

FROM tools
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_CACHE_DIR=1
COPY --chown=kit Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY --chown=kit epsdpo/__init__.py epsdpo/
RUN make .venv/ready
COPY --chown=kit . .
CMD ["make", "demo"]
