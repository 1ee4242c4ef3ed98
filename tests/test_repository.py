"""The README tells of what is there: the tree of files, and the tests of the guarantees."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUARANTEES = {*range(1, 18), 31, 33}


def tracked_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def described_files() -> set[str]:
    """The paths of README's tree: folders end in `/`; two spaces set a comment off."""
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    found = set()
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.strip().split("  ")[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.add("".join(folders) + name)
    return found


def test_the_readme_shows_the_whole_tree() -> None:
    tracked, described = tracked_files(), described_files()
    assert tracked - described == set(), "not in README's tree"
    assert described - tracked == set(), "in README's tree, but not there"


def marked_guarantees() -> set[int]:
    """The numbers in marks `faults(g=…)` of tests."""
    return {
        keyword.value.value
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.faults"
        for keyword in node.keywords
        if keyword.arg == "g" and isinstance(keyword.value, ast.Constant)
    }


def test_each_guarantee_has_a_test_and_a_row_in_the_readme() -> None:
    table = (ROOT / "README.md").read_text().partition("## What it survives")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    told = {int(number) for row in rows for number in row.split(",")}
    assert GUARANTEES - marked_guarantees() == set(), "`make faults G=` would find nothing"
    assert GUARANTEES - told == set(), "not in README's table"
