#!/usr/bin/env bash
# On a machine with a CUDA device, a CUDA build of torch and nvcc: builds pymerge with its CUDA operators in place and
# checks and times it there, a part a call. No network. Each part ends within 9 minutes.
#   bash benchmarks/gpu_check.sh [--part kernels|methods|1b|7b] [--out DIR] [--help]
#   kernels (the default)  the tests marked `device`; compute-sanitizer (memcheck, racecheck) over small calls of every
#            kernel; kernels against torch, cuBLAS, cuSOLVER and, where installed, CuPy, by whose NVRTC the operators run
#            their tests once more; small models merged on the device, with its peak memory against the plan
#   methods  methods for matrices of 1B and 7B models against plain PyTorch on the device, with time and peak memory
#   1b, 7b   whole models of these shapes from disk to disk, made on the spot: 15 and 54 GB on the disk of TMPDIR (with
#            less room: fewer layers), against the CPU and plain PyTorch
# DIR (default benchmarks/results) gets, of kernels, cuda.json (elementwise kernels, tests), cuda_linalg.json (dense
# kernels), device_merge_small.json, cuda_tests.xml; of methods cuda_methods.json; of 1b and 7b device_merge_SHAPE.json;
# of each part cuda_check_PART.json (what every step ended with) and logs.
# `python benchmarks/gpu_table.py` makes gpu.md of them. PYTHON is the interpreter (default python3). Merges need
# pydantic, PyYAML, safetensors and threadpoolctl; what a machine lacks can come with the tree, in PYTHONPATH:
#   pip install --target build/packages --python-version 3.12 --only-binary :all: pydantic      (elsewhere)
# Exit code: 0 when build, tests and benchmarks succeeded and the sanitizer, where it can run, found nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=benchmarks/results
part=kernels
while [ $# -gt 0 ]; do
  case "$1" in
    --part) part="${2:?--part needs a name}"; shift 2 ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "gpu_check: unknown argument $1 (--help)" >&2; exit 2 ;;
  esac
done
case "$part" in
  kernels) results=(cuda.json cuda_linalg.json device_merge_small.json cuda_tests.xml) ;;
  methods) results=(cuda_methods.json) ;;
  1b) results=(device_merge_1b.json) ;;
  7b) results=(device_merge_7b.json device_merge_7b_4_layers.json) ;;
  *) echo "gpu_check: --part must be kernels, methods, 1b or 7b, got $part" >&2; exit 2 ;;
esac
PYTHON="${PYTHON:-python3}"
LIMIT=525  # seconds of 540: what is killed needs a moment to end
mkdir -p "$out"
out="$(cd "$out" && pwd)"
for name in "${results[@]}" "cuda_check_$part.json"; do rm -f "$out/$name"; done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

capability="$("$PYTHON" - <<'EOF'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))
EOF
)" || { echo "gpu_check: no CUDA device that torch can use" >&2; exit 1; }
echo "gpu_check: compute capability $capability"

status=0
steps=()  # "name": {"result": .., "seconds": ..}

# step NAME SECONDS COMMAND..: runs it, at most so long and never beyond the limit; its output goes to DIR/cuda_NAME.log.
step() {
  local name="$1" most="$2" begin="$SECONDS" left=$((LIMIT - SECONDS)) code=0
  shift 2
  [ "$left" -lt "$most" ] && most="$left"
  if [ "$most" -lt 10 ]; then
    code=skipped
  else
    timeout -k 5 "$most" "$@" >"$out/cuda_$name.log" 2>&1 || code=$?
  fi
  case "$code" in
    0) result=passed ;;
    skipped) result="skipped: no time left" ;;
    124 | 137) result="stopped after $most s" ;;
    *) result="failed with $code" ;;
  esac
  took=$((SECONDS - begin))
  echo "gpu_check: $name: $result, $took s"
  [ "$result" = passed ]
}
note() { steps+=("\"$1\": {\"result\": \"$result\", \"seconds\": $took}"); }
finish() {
  (IFS=,; printf '{"seconds": %s, "steps": {%s}}\n' "$SECONDS" "${steps[*]}") >"$out/cuda_check_$part.json"
  echo "gpu_check: $SECONDS s, exit $1"
  exit "$1"
}

export PYMERGE_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability"
step build 240 "$PYTHON" setup.py build_ext --inplace || { note build; tail -40 "$out/cuda_build.log"; finish 1; }
note build
build=$took

# within SECONDS: when a step that may take so long begins its last piece of work.
within() {
  local most="$1" left=$((LIMIT - SECONDS))
  [ "$left" -lt "$most" ] && most="$left"
  echo $((most * 3 / 4))
}

# merge STEP SECONDS SHAPE: whole models of a shape.
merge() {
  local work
  if [ "${#operators[@]}" = 0 ]; then
    work="$(mktemp -d)"  # of this step: one that is stopped leaves its models behind
    TMPDIR="$work" step "$1" "$2" "$PYTHON" benchmarks/device_merge.py --shape "$3" --seconds "$(within "$2")" \
      --out "$out/device_merge_$3.json" || status=1
    rm -rf "$work"
    tail -30 "$out/cuda_$1.log"
  else
    result="not run: pydantic, safetensors, threadpoolctl or PyYAML is not installed" took=0
    echo "gpu_check: $1: $result"
  fi
  note "$1"
}

operators=()  # alone, where pymerge's own requirements are not here
"$PYTHON" -c 'import pydantic, safetensors, threadpoolctl, yaml' 2>/dev/null || operators=(--exclude-dir=engine)

case "$part" in
  methods)
    step methods 500 "$PYTHON" benchmarks/bench_cuda_methods.py --seconds "$(within 500)" --out "$out/cuda_methods.json" \
      || status=1
    tail -40 "$out/cuda_methods.log"
    note methods
    finish "$status"
    ;;
  1b)
    merge merges_1b 500 1b
    finish "$status"
    ;;
  7b)
    merge merges_7b 280 7b
    merge matrices_7b 240 7b_4_layers
    finish "$status"
    ;;
esac

mapfile -t tests < <(grep -rl "${operators[@]}" --include='test_*.py' 'mark\.device' tests)  # others may need more
step tests 120 "$PYTHON" -m pytest -m device "${tests[@]}" -q -p no:cacheprovider --junitxml="$out/cuda_tests.xml" || status=1
note tests
tail -30 "$out/cuda_tests.log"

# A tool that does not start (missing, or not allowed on this machine) is written down and is no failure; what it finds is.
sanitizer="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer || true)"
for tool in memcheck racecheck; do
  if [ -z "$sanitizer" ]; then
    result="not run: compute-sanitizer is not installed" took=0
  elif ! step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 99 \
    "$PYTHON" benchmarks/device_calls.py --device cuda; then
    if [ "$result" = "failed with 99" ]; then
      status=1
    else
      result="refused or unfinished: $result"
    fi
    tail -30 "$out/cuda_$tool.log"
  fi
  echo "gpu_check: $tool: $result"
  note "$tool"
done

step elementwise 80 "$PYTHON" benchmarks/bench_cuda.py --out "$out/cuda.json" --tests "$out/cuda_tests.xml" \
  --build-seconds "$build" || status=1
note elementwise
tail -30 "$out/cuda_elementwise.log"
step linalg 120 "$PYTHON" benchmarks/bench_cuda_linalg.py --out "$out/cuda_linalg.json" || status=1
note linalg
tail -40 "$out/cuda_linalg.log"
step covariance 30 "$PYTHON" benchmarks/bench_cov_accumulate.py --device cuda --out "$out/cov_accumulate.json" || status=1
note covariance

merge merges 100 small

# The same kernels as a wheel without them gets them: compiled by CuPy's NVRTC, the tests of the operators on top.
if "$PYTHON" -c 'import cupy' 2>/dev/null; then
  mv pymerge/_ops_cuda.so "$out/_ops_cuda.so.aside"
  # shellcheck disable=SC2016
  PYMERGE_CUDA=0 CUPY_CACHE_DIR="$out/kernel_cache" step nvrtc 150 bash -c 'set -e
    "$0" setup.py build_ext --inplace
    "$0" -c "from pymerge.ops import implementations as i; assert all(r[\"cuda\"] == \"nvrtc\" for r in i().values())"
    "$0" -m pytest -m device -q -p no:cacheprovider tests/ops' "$PYTHON" || status=1
  mv "$out/_ops_cuda.so.aside" pymerge/_ops_cuda.so
  rm -rf "$out/kernel_cache" pymerge/_ops_nvrtc.so
  tail -30 "$out/cuda_nvrtc.log"
else
  result="not run: CuPy is not installed" took=0
  echo "gpu_check: nvrtc: $result"
fi
note nvrtc
finish "$status"
