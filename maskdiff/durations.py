"""Lengths of time as people write them: '90s', '20m', '1.5h', '1h30m'."""

import re

from .errors import UserError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str, name: str) -> float:
    """Reads '90s', '20m', '1.5h' or '1h30m'. Raises UserError that names the option."""
    parts = re.findall(r"(\d+\.?\d*|\.\d+)([smhd])", text.replace(" ", ""))
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise UserError(f"{name} got {text!r}; it takes a time, such as 90s, 20m, 2h or 1h30m")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if total <= 0:
        raise UserError(f"{name} got {text!r}; it takes a time above 0")
    return total


def words(seconds: float) -> str:
    """'45 s', '4 min', '1 h 20 min', '2 d 3 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
