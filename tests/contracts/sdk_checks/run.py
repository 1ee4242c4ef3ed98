"""`python -m sdk_checks.run CONTEXT.json`: all checks with this environment's `openai`, a JSON line each.

The client reads OPENAI_BASE_URL and OPENAI_API_KEY, as it does by itself.
"""

import json
import sys
import time
import traceback
from pathlib import Path

from openai import OpenAI

from . import chat, errors, files, jobs, models, retries
from .context import Context

CHECKS = {
    name: value
    for module in (errors, files, jobs, chat, retries, models)  # the last one deletes what others use
    for name, value in vars(module).items()
    if name.startswith("check_")
}


def main(context_path: str) -> None:
    """Run the checks in their order."""
    context = Context(**json.loads(Path(context_path).read_text()))
    with OpenAI(timeout=60) as client:
        for name, check in CHECKS.items():
            started = time.monotonic()
            failure = None
            try:
                check(client, context)
            except Exception as error:  # the one boundary: whatever it is, it is this check's result
                described = traceback.TracebackException.from_exception(error, capture_locals=True)
                failure = "".join(described.format())
            result = {"check": name, "failure": failure, "took_s": round(time.monotonic() - started, 2)}
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
