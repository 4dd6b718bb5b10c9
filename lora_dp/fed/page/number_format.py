"""How numbers are written on a page; what is not known is a dash."""

import math

DASH = "–"


def percent(value: float | None) -> str:
    """A share, as 97.5 %."""
    return DASH if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 4) -> str:
    """To so many significant digits."""
    return DASH if value is None or isinstance(value, float) and math.isnan(value) else f"{value:.{digits}g}"


def epsilon(value: float | None) -> str:
    """ε rounded up, never down: 7.99961 is 8, since no more is promised. None is infinite."""
    if value is None or math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit - 1e-9) * unit:.4g}"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return DASH
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:g} B"


def duration(seconds: float | None) -> str:
    """As 2 h 05 min, 3 min 07 s or 12.5 s."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.3g} s"
