#!/usr/bin/env bash
# The operator tests with the native core under AddressSanitizer and UndefinedBehaviorSanitizer: the tree is copied, built
# there with PYMERGE_SANITIZE=1, and tested with the sanitizers' libraries loaded in front of Python. Any finding ends the
# process that has it, and so fails the test. Leaks are not looked for: the interpreter leaves memory behind.
#   PYTHON  interpreter with torch and what the build and the tests need (default .venv/bin/python)
#   Arguments go to pytest; default: the tests of operators, host functions and fault row S50.
#   (--capture=sys: what a sanitizer says goes to the descriptor, past pytest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(realpath -s "${PYTHON:-.venv/bin/python}")"
CXX="${CXX:-g++}"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE csrc pymerge tests benchmarks "$work"
rm -f "$work"/pymerge/*.so
cd "$work"
PYMERGE_CUDA=0 PYMERGE_SANITIZE=1 PATH="$(dirname "$PYTHON"):$PATH" "$PYTHON" setup.py --quiet build_ext --inplace > build.log 2>&1 \
  || { tail -50 build.log; exit 1; }

LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
export LD_PRELOAD PYTHONPATH="$work" OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=12000 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/ops tests/faults/test_operators.py)
"$PYTHON" -m pytest -q --capture=sys -p no:cacheprovider -m "not slow and not device" "${tests[@]}"
