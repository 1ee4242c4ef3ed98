"""Writes the models that both trainers are given: `python models.py TARGET SMOLLM2.gguf`.

TARGET/smol and TARGET/tiny, each with `base`, its reward model `reward`, and `reward-adapter`, of which that
is the merge.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.tiny import build_model
from tests.trainers.judged import build_steerable_model, make_reward_model
from trainers.importer import convert_gguf


def main(target: Path, gguf: Path) -> None:
    for name in ("smol", "tiny"):
        (target / name).mkdir(parents=True)
    (target / "smol" / "base").mkdir()
    convert_gguf(gguf, target / "smol" / "base")
    build_model(target / "tiny" / "plain")
    build_steerable_model(target / "tiny" / "plain", target / "tiny" / "base")
    for name in ("smol", "tiny"):
        make_reward_model(target / name / "base", target / name / "reward")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
