# One image for every part of the service; docker-compose.yml says what each container runs.
FROM python:3.11.13-slim-bookworm

# Triton compiles the launchers of its GPU kernels when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# deepspeed comes as source; nothing of it is compiled ahead of time.
ENV DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# The pinned packages without our code, which changes more often: this layer takes minutes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install -c constraints.txt '.[train,dashboard]'

COPY api api
COPY db db
COPY trainers trainers
COPY workers workers
RUN pip install -c constraints.txt --no-deps --force-reinstall .

# New volumes take the owner of the folder that they cover.
RUN useradd --uid 10001 --create-home residency \
    && install -d -o residency -g residency -m 700 /data /keys
USER residency
