# Sourced by quickstart.sh and test.sh: installs what is missing (Debian packages only) and finds nvcc and the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages="g++ cmake ninja-build libfmt-dev nlohmann-json3-dev libcli11-dev doctest-dev libopenblas-dev libboost-dev \
libsimdjson-dev zlib1g-dev libzstd-dev libxxhash-dev"
missing=""
for package in $packages; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=" $package"
done
# A cmake, ninja or compiler that did not come from a package serves as well.
for tool in g++ cmake ninja; do
  if command -v "$tool" >/dev/null; then
    [ "$tool" = ninja ] && tool=ninja-build
    missing=${missing/ $tool/}
  fi
done
if [ -n "$missing" ]; then
  echo "Installing with apt-get:$missing"
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo"
  $as_root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

command -v nvcc >/dev/null || { [ -x /usr/local/cuda/bin/nvcc ] && export PATH="$PATH:/usr/local/cuda/bin"; } || true
have_nvcc=$(command -v nvcc >/dev/null && echo yes || echo no)
# The GPU's architecture as CMake names it (90a has the instructions that only Hopper knows); empty without a GPU.
gpu_arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ' || true)
[[ "$gpu_arch" =~ ^[0-9]+$ ]] || gpu_arch=""
[ "$gpu_arch" = 90 ] && gpu_arch=90a
true
