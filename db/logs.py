"""How every process of the service logs: a line an event, as JSON for machines or as text for people."""

import json
import logging
import logging.config
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# They tell at INFO of every request to an engine, and of every ring, which carries no work.
_CHATTY = ("httpx", "httpcore", "alembic", "celery.app.trace", "celery.worker.strategy")
_bound: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)


class LogSettings(BaseSettings):
    """Read from `RESIDENCY_*`."""

    model_config = SettingsConfigDict(env_prefix="RESIDENCY_")

    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="`auto`: text on a terminal, else JSON."
    )


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, what is bound, an exception as one text."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and in brackets what is bound."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, without its exception."""
        told = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + (f" [{told}]" if told else "")


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Have all lines of this thread or asyncio task say `fields`, until the end of the block."""
    token = _bound.set((_bound.get() or {}) | fields)
    try:
        yield
    finally:
        _bound.reset(token)


def configure(level: int | str = "INFO") -> None:
    """Send `level` and above to stderr, in the form that RESIDENCY_LOG_FORMAT says."""
    logging.config.dictConfig(describe(level))


def describe(level: int | str = "INFO") -> dict[str, Any]:
    """The same as a dictionary of `logging.config`, for those who pass it on to other processes."""
    form = LogSettings().log_format
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    formatter = JsonFormatter if form == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {name: {"level": "WARNING"} for name in _CHATTY},
    }


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return (_bound.get() or {}) | getattr(record, "fields", {})
