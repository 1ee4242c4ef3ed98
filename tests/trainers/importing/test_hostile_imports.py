"""Hostile models are refused with a code: none runs, hangs, breaks the importer or passes (G22, G23)."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.importing import hostile
from trainers.folders.artifacts import Refused
from trainers.importer import import_model
from trainers.models.chat_template import TemplateRefused, check_chat_template

# What importing torch and transformers takes is no sign of anything.
MEMORY_BYTES = 1 << 30
# Tells its own peak, in KiB. What `wait4` tells begins with the memory of whoever forked it.
IMPORTER = """
import sys
from pathlib import Path
from trainers.importer import main
code = main()
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "source"))


def refusal_alone(source: Path, folder: Path) -> str:
    """The code that a process of its own refuses `source` with, without having taken much memory."""
    report, log = folder / "report.json", folder / "log.txt"
    argv = [sys.executable, "-c", IMPORTER, str(source), str(folder / "out"), "--report", str(report)]
    with log.open("wb") as errors:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=errors, check=False)
    assert done.returncode == 3, log.read_text()[-2000:]
    assert int(done.stdout.split()[-2]) * 1024 < MEMORY_BYTES
    return json.loads(report.read_text())["error"]["code"]


@pytest.mark.parametrize("case", hostile.FOLDERS, ids=lambda case: case.name)
def test_hostile_folders_are_refused(case: hostile.Case, source: Path, tmp_path: Path) -> None:
    case.damage(source)
    if case.alone:
        assert refusal_alone(source, tmp_path) == case.code
    else:
        with pytest.raises(Refused) as refused:
            import_model(source, out_dir=tmp_path / "out")
        assert refused.value.code == case.code, refused.value
        assert len(str(refused.value)) < 1000
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("name", hostile.GGUFS)
def test_hostile_gguf_files_are_refused(name: str, tmp_path: Path) -> None:
    content, code = hostile.GGUFS[name]
    (tmp_path / "model.gguf").write_bytes(content)
    assert refusal_alone(tmp_path / "model.gguf", tmp_path) == code


def test_a_source_that_is_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "link.gguf").symlink_to(source / "config.json")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("link", "link.gguf", "pipe.gguf"):
        with pytest.raises(Refused) as refused:
            import_model(tmp_path / name, out_dir=tmp_path / "out")
        assert refused.value.code == "not_a_model"


@pytest.mark.parametrize("name", hostile.TEMPLATES)
def test_a_template_costs_two_seconds_at_most(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateRefused):
        check_chat_template(hostile.TEMPLATES[name], special_tokens={})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 2.0


def test_templates_are_judged_before_torch_is_imported(source: Path, tmp_path: Path) -> None:
    """A hostile folder must not cost the seconds, and the memory, that transformers takes."""
    hostile.PLACES["chat_template.jinja"](hostile.TEMPLATES["include"])(source)
    program = (
        "import sys; from trainers.importer import main;"
        "code = main(sys.argv[1:]); print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    argv = [
        sys.executable,
        "-c",
        program,
        str(source),
        str(tmp_path / "out"),
        "--report",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False", "False"]


def test_a_small_file_that_declares_a_huge_model_takes_no_memory(tiny_model: Path, tmp_path: Path) -> None:
    from tests.trainers.importing.test_importer import write_gguf

    # Tensors that are not there have the declared size: six of 3.8 GB.
    declared = {"leave_out": "mlp", "intermediate_size": 30_000_000}
    write_gguf(tmp_path / "model.gguf", model_dir=tiny_model, **declared)
    assert refusal_alone(tmp_path / "model.gguf", tmp_path) == "load_failed"


def test_named_templates_are_imported_with_the_model(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hostile.PLACES["additional"]("{{ messages[0]['content'] }}")(source)
    import_model(source, out_dir=tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert set(templates) == {"default", "tool_use"}
