"""The tree in the README is the tree that is there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
