#!/usr/bin/env bash
# Builds the container image and runs it: `make image`, as docs/guides/installation.md says. Where that is not possible, says so and
# ends well.
#
# With Docker at work, the base is the image that the Dockerfile names. Without it, a Debian system run by root gets podman, and a
# Debian of the same Python as base: no registry of images is needed then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH" || true' EXIT
TAG=${TAG:-mae-et:cuda}
BASE=localhost/debian-python:12

skip() {
  echo "container image: NOT built: $1"
  exit 0
}

make_base() {  # Debian 12 has Python 3.11
  local packages=ca-certificates,python3,python3-pip,python-is-python3
  apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends debootstrap podman runc \
    && debootstrap --variant=minbase --include="$packages" bookworm "$SCRATCH/base" \
    && rm "$SCRATCH"/base/usr/lib/python3*/EXTERNALLY-MANAGED \
    && tar --directory "$SCRATCH/base" --create . | podman import - "$BASE" \
    && rm -rf "$SCRATCH/base"
}

build=(--build-arg DEVICE=cuda --tag "$TAG")
if docker info >/dev/null 2>&1; then
  docker build "${build[@]}" .
  run=(docker run)
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { podman image exists "$BASE" && runc --version || make_base; } >"$SCRATCH/base.log" 2>&1 \
    || { tail -5 "$SCRATCH/base.log"; skip "podman and its base image could not be set up"; }
  # The certificates of this machine, in case a proxy stands before the package index. chroot: no nested container for each step.
  podman build --isolation chroot --pull=never --volume /etc/ssl/certs:/etc/ssl/certs:ro --build-arg BASE="$BASE" \
    "${build[@]}" . >"$SCRATCH/build.log" 2>&1 || { tail -40 "$SCRATCH/build.log"; exit 1; }
  # Limits below this machine's own: a container may not raise them without the right to.
  run=(podman --cgroup-manager=cgroupfs --runtime=runc run --ulimit nofile=1000:1000 --ulimit nproc=1000:1000)
else
  skip "no Docker at work here, and no right to install podman"
fi

mkdir "$SCRATCH/runs"
chmod 755 "$SCRATCH"
chmod 777 "$SCRATCH/runs"  # the user of the image writes there
run+=(--rm --network none --ipc=host --volume "$SCRATCH/runs:/runs" "$TAG")
"${run[@]}" --version
"${run[@]}" plan photos --dataset-size 5000 >/dev/null
"${run[@]}" pretrain demo --work-dir /runs/demo --cfg-options curriculum.equivalent_epochs=0.2 curriculum.warmup_equivalent_epochs=0.02
"${run[@]}" doctor /runs/demo
echo "container image: built, and it pre-trained and checked a model"
