#!/usr/bin/env bash
# Shows that one wheel serves every release of PyTorch: `pip wheel .` builds it where PyTorch is not installed, it holds
# what it should, its library loads without PyTorch, and a private training step runs on another release than the calling
# environment's: the oldest that the wheel allows, or the newest other one where the calling environment has that. Where
# pip can download no other release, the last part is skipped, and says so. The downloads take about 5 GB, which go
# whatever happens. The one argument is a Python of the calling environment (default: python).
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$("${1:-python}" -c 'import sys; print(sys.executable)')
workspace=$(mktemp -d)
trap 'rm -rf "$workspace"' EXIT
unset PIP_QUIET PIP_NO_BUILD_ISOLATION
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1
cd "$workspace"

"$python" -m pip wheel --verbose --no-deps --wheel-dir wheel --config-settings=build-dir="$workspace/build" \
  "$repository" &>log || { cat log; exit 1; }
echo "built beside: $(sed -n '0,/.*Successfully installed /s///p' log)"
wheel=$(echo "$workspace"/wheel/*.whl)

"$python" - "$wheel" "$repository" log <<'PYTHON'
import sys
import zipfile
from fnmatch import filter
from pathlib import Path

wheel, repository, log = sys.argv[1:]
beside = next(line for line in open(log) if "Successfully installed" in line)
assert "nanobind" in beside and "torch" not in beside, beside
names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
libraries = filter(names, "lora_dp/_native*.so")
assert len(libraries) == 1, libraries
root = Path(repository)
sources = {path.relative_to(root).as_posix() for pattern in ("*.py", "*.pyi", "py.typed", "*.j2", "fed/models/weights/*")
           for path in (root / "lora_dp").rglob(pattern)}
kernels = {f"lora_dp/kernels/{path.name}" for path in (root / "kernels").glob("*.py")}
assert kernels and {"lora_dp/py.typed", "lora_dp/_native.pyi"} < sources and filter(sources, "*.safetensors")
assert set(names) == sources | kernels | set(libraries), set(names) ^ (sources | kernels | set(libraries))
print(f"{Path(wheel).name}: {len(names)} files, {Path(wheel).stat().st_size / 1e6:.1f} MB")
PYTHON

"$python" -m venv venv
venv/bin/pip install -qq --no-deps "$wheel"
venv/bin/python - <<'PYTHON'
import importlib.util
from pathlib import Path

assert importlib.util.find_spec("torch") is None
(library,) = Path(importlib.util.find_spec("lora_dp").origin).parent.glob("_native*.so")
spec = importlib.util.spec_from_file_location("_native", library)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.drop_key(native.key_from(bytes(32)))
print(f"{library.name}: loads without PyTorch, kernels for {native.instructions()}, for CUDA: {native.cuda}")
PYTHON

wanted=$("$python" - "$wheel" <<'PYTHON'
import re
import sys
import zipfile

import torch

archive = zipfile.ZipFile(sys.argv[1])
metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
oldest = re.search(r"^Requires-Dist: torch>=(\d+\.\d+)$", metadata, re.M)[1]
print(f"torch=={oldest}.*" if not torch.__version__.startswith(f"{oldest}.") else f"torch!={oldest}.*")
PYTHON
)
if ! venv/bin/pip install --quiet --dry-run --no-deps "$wanted" &>log; then
  echo "SKIPPED: a step on another release of PyTorch: pip finds no $wanted: $(tail -n 1 log)"
  exit 0
fi
venv/bin/pip install -qq --no-compile "$wheel" "$wanted"
venv/bin/python - "$("$python" -c 'import torch; print(torch.__version__)')" <<'PYTHON'
import sys

import torch

import lora_dp
from lora_dp import LoRAConfig, PrivacyEngine, inject_lora

assert lora_dp.__file__.startswith(sys.prefix) and torch.__version__ != sys.argv[1], (lora_dp.__file__, torch.__version__)
torch.manual_seed(0)
model = inject_lora(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)),
                    LoRAConfig(r=2, alpha=4, target_modules=["0", "2"]))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
before = [parameter.detach().clone() for parameter in trained]
data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randint(2, (64,)))
engine = PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.make_private(
    model=model, optimizer=torch.optim.AdamW(trained), data_loader=torch.utils.data.DataLoader(data, batch_size=16),
    noise_multiplier=1.0, max_grad_norm=1.0)
for inputs, labels in loader:
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
assert all(p.isfinite().all() for p in trained)
assert not all(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
print(f"private steps on PyTorch {torch.__version__}, epsilon {engine.get_epsilon(1e-3):.2f}; "
      f"the calling environment has {sys.argv[1]}")
PYTHON
