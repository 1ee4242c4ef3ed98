"""Log lines for people: time, level, module, message."""

import logging


def configure_logging() -> None:
    """Send INFO and above to stderr in one form."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
