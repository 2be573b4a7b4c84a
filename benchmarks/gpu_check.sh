#!/usr/bin/env bash
# On a machine with a CUDA device, a CUDA build of torch and nvcc: builds pymerge with its CUDA operators in place, runs
# the tests marked `device`, times the kernels. No network. Ends within 9 minutes.
#   bash benchmarks/gpu_check.sh [--out DIR]      DIR (default benchmarks/results): cuda.json, cuda_tests.xml, logs
# PYTHON is the interpreter (default python3). Exit code: 0 when all steps succeeded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=benchmarks/results
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    *) echo "gpu_check: unknown argument $1" >&2; exit 2 ;;
  esac
done
PYTHON="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

capability="$("$PYTHON" - <<'EOF'
import torch

major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))
EOF
)" || { echo "gpu_check: no CUDA device that torch can use" >&2; exit 1; }
echo "gpu_check: compute capability $capability"

begin=$SECONDS
PYMERGE_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" timeout 270 "$PYTHON" setup.py build_ext --inplace \
  >"$out/cuda_build.log" 2>&1 || { tail -40 "$out/cuda_build.log"; echo "gpu_check: the build failed"; exit 1; }
build=$((SECONDS - begin))
echo "gpu_check: built in $build s"

status=0
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.device' tests)  # others may need packages that are not here
timeout 150 "$PYTHON" -m pytest -m device "${tests[@]}" -q -p no:cacheprovider --junitxml="$out/cuda_tests.xml" 2>&1 |
  tee "$out/cuda_tests.log" | tail -40 || status=1
timeout 100 "$PYTHON" benchmarks/bench_cuda.py --out "$out/cuda.json" --tests "$out/cuda_tests.xml" \
  --build-seconds "$build" || status=1
timeout 20 "$PYTHON" benchmarks/bench_cov_accumulate.py --device cuda --out "$out/cov_accumulate.json" || status=1
echo "gpu_check: $SECONDS s, exit $status"
exit $status
