#!/bin/sh
# Builds the module with AddressSanitizer and UBSan in one folder of csrc (emu or cpu), beside the
# normal build, and runs tests on it: sh cmake/sanitize.sh emu|cpu PYTHON [pytest arguments]. The
# normal build is not touched.
set -eu
part=$1
python=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize_$part
site=$build/site
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
mkdir -p "$site"
cmake -S "$root" -B "$build" -G Ninja -DDSK_SANITIZE="$part" -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DDSK_MODULE_PATH="$site/dskernels/_C$suffix" ${DSK_CMAKE_ARGS:-} > "$build/configure.log"
cmake --build "$build" --target _C > "$build/build.log" || { tail -40 "$build/build.log"; exit 1; }
# The package as it is, with the other module; kernels come from the normal build, if there is one.
(cd "$root" && find dskernels -name '*.py' -o -path 'dskernels/_kernels/*' -type f | tar cf - -T -) |
  tar xf - -C "$site"
# nvcc must not inherit what is preloaded here.
if nvcc=$(command -v nvcc); then
  mkdir -p "$build/bin"
  printf '#!/bin/sh\nunset LD_PRELOAD\nexec "%s" "$@"\n' "$nvcc" > "$build/bin/nvcc"
  chmod +x "$build/bin/nvcc"
fi
# A finding ends the process; pytest has its stderr, so the report goes to $build/report.*.
# The runtimes must come before everything else in the process; Python itself leaks by design.
cxx=${CXX:-g++}
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$build/report" \
  UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:log_path=$build/report" \
  PATH="$build/bin:$PATH" PYTHONSAFEPATH=1 PYTHONPATH="$site" "$python" -m pytest "$@"
