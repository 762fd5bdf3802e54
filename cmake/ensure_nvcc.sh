#!/bin/sh
# Make sure some nvcc can be found (PATH, CUDA_HOME, or NVIDIA's pip wheels), for the virtual
# environment whose python is $1. Without one the package still builds; it only lacks CUDA kernels.
set -u
python=$1
if command -v nvcc >/dev/null 2>&1 || [ -x "${CUDA_HOME:-/nonexistent}/bin/nvcc" ]; then
  exit 0
fi
echo "no nvcc on PATH or in CUDA_HOME: installing NVIDIA's compiler wheels (release 13.0)"
"$python" -m pip install -q "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-crt==13.0.*" \
  "nvidia-cuda-cccl==13.0.*" "nvidia-cuda-runtime==13.0.*" "nvidia-nvvm==13.0.*" ||
  echo "could not install them: the CUDA kernels are left out, everything else works"
