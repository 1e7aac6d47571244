#!/bin/sh
# Builds the four images with the engine that is here: docker, podman or buildah, and prints their sizes.
#   BASE         base image; pin it by digest
#   ACCELERATOR  cuda (default) or cpu
#   TORCH_INDEX  address of PyTorch's index of CPU builds, for ACCELERATOR=cpu
#   PIP_CONF     a pip.conf for the build alone; it stays out of the images
#   ENGINE       docker, podman or buildah; OPTIONS  further options of its build command
set -eu
cd "$(dirname "$0")/.."
engine=${ENGINE:-$(command -v docker || command -v podman || command -v buildah || true)}
[ -n "$engine" ] || { echo "error: neither docker, podman nor buildah is here; install one" >&2; exit 1; }
for target in base train worker orchestrator; do
  set -- build --file docker/Dockerfile --target "$target" --tag "vlfm-$target"
  [ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
  set -- "$@" --build-arg "ACCELERATOR=${ACCELERATOR:-cuda}" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}"
  [ -z "${PIP_CONF:-}" ] || set -- "$@" --secret "id=pip,src=$PIP_CONF"
  # podman and buildah make OCI images, which know no health check, unless they are told.
  case $engine in *docker) ;; *) set -- "$@" --format docker --layers ;; esac
  # shellcheck disable=SC2086  # OPTIONS holds words
  "$engine" "$@" ${OPTIONS:-} .
done
"$engine" images | grep -E 'vlfm-|^REPOSITORY'
