"""Without an extra one sentence says which to install."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["jsonargparse", "rich", "yaml"])
def test_without_its_extra_it_says_which_to_install(package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from lora_dp.fed.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert (
        line.startswith(f"error: lora_dp.fed needs {package}, which is not installed")
        and "'fed'" in line
        and ".[fed]" in line
    )
