#!/usr/bin/env bash
# Tests the CPU half of lora_dp._native under AddressSanitizer and UndefinedBehaviorSanitizer, and fails where one of them
# finds a fault. The library is built in a temporary folder, with a copy of the package that the tests import instead of
# the installed one; neither that nor the working tree is touched. Leaks are not looked for: the interpreter's own would
# drown ours. Needs GCC. The one argument is a Python with the package's test dependencies (default: python).
set -euo pipefail

tests=(
  tests/ops/test_chacha20.py
  tests/ops/test_sampling_bits.py
  tests/ops/test_native.py
  tests/ops/test_gaussian_pairs.py
  tests/ops/test_rounded_gaussian.py
  tests/ops/test_noise_statistics.py
  tests/ops/test_private_update.py
  tests/ops/test_update_refusals.py
  tests/ops/test_hostile_buffers.py
  tests/ops/test_hostile_tensors.py
  tests/ops/test_hostile_updates.py
  tests/privacy/test_noise.py
  tests/privacy/test_mechanism.py
  tests/privacy/test_randomness.py
  tests/privacy/test_draws.py
  tests/privacy/test_secret_keys.py
)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$("${1:-python}" -c 'import sys; print(sys.executable)')
export CXX=${CXX:-g++}
workspace=$(mktemp -d)
trap 'rm -rf "$workspace"' EXIT

"$python" -m pip install --quiet --no-deps --target "$workspace/tree" \
  --config-settings=build-dir="$workspace/build" --config-settings=cmake.build-type=Debug \
  --config-settings=cmake.define.LORA_DP_SANITIZE=ON --config-settings=cmake.define.LORA_DP_CUDA=OFF \
  --config-settings=cmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON "$repository"
cp -r "$repository/tests" "$repository/pyproject.toml" "$workspace/tree"
# An editable install puts its own finder ahead of every path.
cat >"$workspace/tree/sitecustomize.py" <<'PYTHON'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
PYTHON
cd "$workspace/tree"

"$python" - "$workspace/build/compile_commands.json" <<'PYTHON'
import json
import sys

for entry in json.load(open(sys.argv[1])):
    assert "-fsanitize=address,undefined" in entry["command"], f"not sanitized: {entry['file']}"
PYTHON

# The interpreter is not sanitized, so the runtimes must be loaded ahead of it.
export LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$PWD OMP_NUM_THREADS=1

"$python" -c 'import os; from lora_dp import _native as n; assert n.__file__.startswith(os.getcwd()), n.__file__'
"$python" -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys --hypothesis-profile=ci -m "not long" \
  "${tests[@]}"
