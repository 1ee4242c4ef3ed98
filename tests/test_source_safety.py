"""The source itself keeps away from what runs data as code (G22)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "db", "trainers", "workers")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_parts(source: str, *, in_trainers: bool) -> Iterator[str]:
    """What `source` does that could run data as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("eval", "exec"):
                yield called
            if called == "torch.load" and not (in_trainers and options.get("weights_only") == "True"):
                yield called
            yield from (
                name for name in ("trust_remote_code", "shell") if options.get(name, "False") != "False"
            )
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and ast.unparse(key) == "'trust_remote_code'":
                    yield from ["trust_remote_code"] if ast.unparse(value) != "False" else []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_runs_data_as_code(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {part}"
        for path in (ROOT / package).rglob("*.py")
        for part in unsafe_parts(path.read_text(), in_trainers=package == "trainers")
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=allowed)",
        "load(path, **{'trust_remote_code': True})",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(unsafe_parts(source, in_trainers=True))
