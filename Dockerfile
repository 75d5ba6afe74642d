# The command mae-et with all shipped configs, detection and segmentation included. Build arguments:
#   DEVICE=cuda (default): the wheels of PyPI, which bring CUDA; the host needs a driver and the NVIDIA container toolkit
#   DEVICE=cpu: PyTorch's wheels without CUDA, from the package index CPU_INDEX
#   PYTHON: 3.10 to 3.12
#   BASE: another base image; it needs the commands python and pip
# Usage: docs/guides/installation.md
ARG PYTHON=3.11
ARG BASE=python:${PYTHON}-slim
FROM ${BASE}

ARG DEVICE=cuda
ARG CPU_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/mae_et

# Before the code, so that a change of the code installs no package again.
COPY requirements.txt requirements-mm.txt ./
RUN case "$DEVICE" in \
      cpu) test -n "$CPU_INDEX" || { echo "DEVICE=cpu needs CPU_INDEX: docs/guides/installation.md" >&2; exit 1; }; \
        pip install --index-url "$CPU_INDEX" $(grep -E '^(torch|torchvision)==' requirements.txt) \
        && grep -vE '^(cuda-|nvidia-|triton==)' requirements.txt > /tmp/requirements.txt ;; \
      cuda) cp requirements.txt /tmp/requirements.txt ;; \
      *) echo "DEVICE=$DEVICE must be cpu or cuda" >&2; exit 1 ;; \
    esac \
 && pip install --only-binary :all: -r /tmp/requirements.txt \
 && MMCV_WITH_OPS=0 pip install --no-deps -r requirements-mm.txt \
 && rm /tmp/requirements.txt

COPY pyproject.toml setup.py README.md LICENSE CHANGELOG.md ./
COPY mae_et ./mae_et
COPY downstream ./downstream
COPY configs ./configs
COPY tools ./tools
RUN pip install --no-deps --no-build-isolation .

# Runs are written to /runs, which is a volume; no root rights are needed.
RUN useradd --create-home --uid 1000 user && mkdir /runs && chown user /runs
USER user
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["mae-et"]
CMD ["--help"]
