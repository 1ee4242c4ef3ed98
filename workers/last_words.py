"""How a run ended: what the trainer wrote last or, where it could not write any more, what its log tells."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

from workers import processes

# torch/distributed/elastic/multiprocessing/api.py, of each rank; a negative status is a signal.
_ENDED_BY_SIGNAL = re.compile(r"failed \(exitcode: -(\d+)\)")
# torch's watchdog says so and aborts the process: nothing of ours gets to run.
_WATCHDOG = "Watchdog caught collective operation timeout"
_READ_BYTES = 256 * 1024
_NO_ROOM_BYTES = 1 << 20  # with less, a trainer may have been unable to say so in exit.json


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """`exit.json`, or the same of a trainer that was ended: {reason, message}. None when nothing is known."""
    path = run_dir / "exit.json"
    if path.is_file():
        return json.loads(path.read_text())
    nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    if shutil.disk_usage(nearest).free < _NO_ROOM_BYTES:
        return {"reason": "disk_full", "message": "no space left on the disk of the runs"}
    log = processes.tail(run_dir / "log.txt", max_bytes=_READ_BYTES)
    # Each node of a gang has a log, and the watchdog speaks on the one where somebody waited.
    of_others = (processes.tail(path, max_bytes=_READ_BYTES) for path in run_dir.glob("log-*.txt"))
    if _WATCHDOG in log or any(_WATCHDOG in other for other in of_others):
        message = "The processes waited for one of them in vain"
        return {"reason": "nccl_timeout", "message": message}
    found = _ENDED_BY_SIGNAL.search(log)
    if found is None:
        return None
    name = _name_signal(int(found[1]))
    return {"reason": "killed", "message": f"The trainer was killed by {name}", "signal": name}


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
