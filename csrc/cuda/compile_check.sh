#!/usr/bin/env bash
# Compiles every CUDA file for all architectures and links _ops_cuda.so without a GPU and without a CUDA build of torch.
# Prints registers and spills of each kernel. Fails on errors and warnings, on spills above SPILL_LIMIT bytes, on an
# undefined symbol that allowed_symbols.txt does not list, on a Python symbol, and on an operator that is not registered.
# A file costs about 16 s of CPU time, nearly all of it for headers, each of the compilers about 0.5 GB.
#   PYTHON  interpreter with torch (default .venv/bin/python)    JOBS  files at a time (default 2)
#   THREADS  architectures of a file at a time (default 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v nvcc >/dev/null; then
  echo "compile_check: nvcc is not installed, CUDA sources were not compiled"
  exit 0
fi
PYTHON="${PYTHON:-.venv/bin/python}"
JOBS="${JOBS:-2}"
THREADS="${THREADS:-2}"
SPILL_LIMIT=32  # bytes stored plus loaded, per kernel and architecture
ARCHITECTURES=(80 90a 100)

torch="$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

gencode=()
for arch in "${ARCHITECTURES[@]}"; do gencode+=("-gencode=arch=compute_$arch,code=sm_$arch"); done
export torch work
export NVCC_FLAGS="-std=c++20 -O3 -fmad=false -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000ULL
  -Xcompiler=-fPIC,-fvisibility=hidden -isystem=$torch/include -isystem=$torch/include/torch/csrc/api/include
  --threads=$THREADS -Xptxas=-v --Werror=all-warnings ${gencode[*]}"

compile() {
  local stem begin="$SECONDS"
  stem="$(basename "$1" .cu)"
  # shellcheck disable=SC2086
  if ! nvcc $NVCC_FLAGS -c "$1" -o "$work/$stem.o" >"$work/$stem.log" 2>&1; then
    echo "compile_check: $1 does not compile" >&2
    grep -vE '^ptxas info|bytes stack frame|bytes gmem' "$work/$stem.log" >&2
    return 1
  fi
  echo "$((SECONDS - begin)) s $stem" >>"$work/seconds"
}
export -f compile

begin="$SECONDS"
wc -c csrc/cuda/*.cu csrc/cuda/*.cuh >"$work/sizes"
# Files with the longest kernels first: none of them then runs alone at the end.
for file in csrc/cuda/*.cu; do
  awk -v cu="$file" '$2 == cu || $2 == cu "h" { size += $1 } END { print size, cu }' "$work/sizes"
done | sort -rn | cut -d' ' -f2 | xargs -n 1 -P "$JOBS" bash -c 'compile "$0"'
echo "compile_check: $(wc -l <"$work/seconds") files in $((SECONDS - begin)) s, longest: $(sort -rn "$work/seconds" | head -1)"

# file, kernel, then registers/spilled bytes of each architecture
table() {
  for log in "$work"/*.log; do
    awk -v file="$(basename "$log" .log)" '
      /Compiling entry function/ { split($0, q, "\047"); name = q[2]; arch = q[4]; spill[name, arch] = 0; names[name] }
      /bytes spill stores/ { if (name != "") spill[name, arch] += $5 + $9 }
      /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); used[name, arch] = substr($0, RSTART + 5, RLENGTH - 5) }
      END {
        for (name in names) {
          line = file " " name
          for (i = 1; i <= split(archs, a, " "); ++i) line = line " " used[name, "sm_" a[i]] "/" spill[name, "sm_" a[i]]
          print line
        }
      }' archs="${ARCHITECTURES[*]}" "$log"
  done
}
table | c++filt -i | sed -E 's/(void )?pymerge::cuda:://g; s/\((pymerge|int|double|Task)[^)]*\)//g' | sort >"$work/table"
printf 'registers/spilled bytes on sm_%s (merge_kernel<dtype, parts>: 0 bfloat16, 1 float16, 2 float32, -1 any)\n' \
  "$(IFS=,; echo "${ARCHITECTURES[*]}")"
cat "$work/table"
if grep -E ' /|/( |$)' "$work/table"; then
  echo "compile_check: the compiler's report lacks these architectures (lines mixed? THREADS=1)"
  exit 1
fi
awk -v limit="$SPILL_LIMIT" '{
  for (i = 1; i <= NF; ++i) if ($i ~ /^[0-9]+\/[0-9]+$/) { split($i, n, "/"); if (n[2] > limit) bad = bad "\n  " $0 }
} END { if (bad) { print "compile_check: more than " limit " bytes spilled:" bad; exit 1 } }' "$work/table"

g++ -shared -fPIC -Wl,-soname,libtorch_cuda.so csrc/cuda/standin_torch_cuda.cpp -o "$work/libtorch_cuda.so"
nvcc -shared -cudart static "$work"/*.o -o "$work/_ops_cuda.so" -L"$work" -L"$torch/lib" -ltorch_cuda -ltorch_cpu -lc10 \
  -Xlinker --no-undefined

# Symbols of the C and C++ run-time libraries carry a version or are in namespace std; all others must be on the list.
nm -D --undefined-only "$work/_ops_cuda.so" |
  awk '$1 == "U" && $2 !~ /@(GLIBC|GLIBCXX|CXXABI|GCC)_/ && $2 !~ /^_ZN?[KRO]*St/ { print $2 }' |
  LC_ALL=C sort -u >"$work/undefined"
LC_ALL=C comm -23 "$work/undefined" <(grep -v '^#' csrc/cuda/allowed_symbols.txt | LC_ALL=C sort -u) >"$work/foreign"
if [ -s "$work/foreign" ]; then
  echo "compile_check: undefined symbols that csrc/cuda/allowed_symbols.txt does not list:"
  cat "$work/foreign"
  exit 1
fi
if nm -D "$work/_ops_cuda.so" | grep -E ' _?Py[A-Z_]'; then
  echo "compile_check: _ops_cuda.so has Python symbols"
  exit 1
fi
cuda="$work" "$PYTHON" - <<'PYTHON'
import ctypes
import os
import re
from pathlib import Path

import torch

ctypes.CDLL(os.environ["cuda"] + "/libtorch_cuda.so", ctypes.RTLD_GLOBAL)
torch.ops.load_library(os.environ["cuda"] + "/_ops_cuda.so")
sources = {path.stem: path.read_text() for path in Path("csrc/cuda").glob("*.cu")}
found = {stem: re.findall(r'm\.impl\("(\w+)"', text) for stem, text in sources.items()}
empty = [stem for stem, names in found.items() if not names]
if empty:
    raise SystemExit(f"compile_check: no operator is registered in {', '.join(empty)}")
names = [name for names in found.values() for name in names]
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in names if not has(f"pymerge::{name}", "CUDA")]
if missing:
    raise SystemExit(f"compile_check: no CUDA kernel is registered for {', '.join(missing)}")
PYTHON
# The same kernels as CuPy's NVRTC compiles them at their first launch.
if "$PYTHON" -c 'from cupy.cuda import nvrtc; nvrtc.getVersion()' 2>/dev/null && [ -f pymerge/_ops_nvrtc.so ]; then
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/native/test_nvrtc.py -k "nvrtc_compiles or nvrtc_gives"
else
  echo "compile_check: NVRTC: skipped, CuPy, its NVRTC or pymerge/_ops_nvrtc.so is not there"
fi
echo "compile_check: linked, $(wc -l <"$work/undefined") symbols of libtorch, ${SECONDS} s"
