#!/bin/sh
# compile_kernel.sh NVCC CSRC SOURCE NAME WORK_DIR OUT_DIR
# One kernel instance -> OUT_DIR/NAME.{cubin,ptx,ptxas.txt}. -lineinfo lets reports name the CUDA
# source line; ptxas' report is shipped because registers, spills and stack are checked from it.
set -eu
nvcc=$1 csrc=$2 source=$3 name=$4 work=$5 out=$6
mkdir -p "$work" "$out"
if ! "$nvcc" -cubin -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -lineinfo \
  --expt-relaxed-constexpr -Xptxas=-v,--warn-on-spills "-I$csrc" --keep --keep-dir "$work" \
  -MMD -MF "$work/$name.d" -MT "$out/$name.cubin" \
  -o "$out/$name.cubin" "$source" >"$work/$name.ptxas.txt" 2>&1; then
  cat "$work/$name.ptxas.txt" >&2
  exit 1
fi
cp "$work/$name.ptx" "$work/$name.ptxas.txt" "$out/"
