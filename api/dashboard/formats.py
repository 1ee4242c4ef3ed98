"""Numbers, sizes and moments as people read them."""

import time
from typing import Any

UNKNOWN = "\N{EN DASH}"


def ago(moment_s: float | None, *, now_s: float | None = None) -> str:
    """How long ago, or in how long, a Unix time is: `3 min ago`, `in 2 h`."""
    if moment_s is None:
        return UNKNOWN
    distance_s = moment_s - (time.time() if now_s is None else now_s)
    if abs(distance_s) < 5:
        return "now"
    words = duration(abs(distance_s))
    return f"in {words}" if distance_s > 0 else f"{words} ago"


def moment(moment_s: float | None) -> str:
    """A Unix time in full, in UTC."""
    if moment_s is None:
        return UNKNOWN
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment_s))


def duration(seconds: float | None) -> str:
    """A span in its largest unit, with the next one where that is small: `42 s`, `3 min`, `1 h 20 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 10 and minutes:
        return f"{hours} h {minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} d"


def size(size_bytes: float | None) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    if size_bytes is None:
        return UNKNOWN
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def number(value: float | None) -> str:
    """A count with groups of digits, or a measure with four significant ones."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share of 1 in percent."""
    return UNKNOWN if share is None else f"{100 * share:.0f} %"


def plain(value: Any) -> str:
    """Any value of a parameter on one line."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or UNKNOWN
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items()) or UNKNOWN
    return str(value)


def readable(text: str) -> str:
    """What a model said, with a mark for each NUL: no page shows one, and no server takes it back."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
