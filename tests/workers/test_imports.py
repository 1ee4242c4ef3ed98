"""The API and the workers must start fast and small: no torch in them."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


MODULES = ("api.main", "workers.app", "workers.ring", "workers.serve", "api.up", "api.cli")


@pytest.mark.parametrize("module", MODULES)
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
