"""`python -m api.openapi` prints the description of the API."""

import json
import sys

from api.main import create_app


def main() -> None:
    """Write it as JSON, in an order that changes only with its content."""
    sys.stdout.write(json.dumps(create_app().openapi(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
