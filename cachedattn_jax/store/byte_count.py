"""Numbers of bytes as people write them. Knows units and nothing else."""

import re
from typing import no_type_check

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@no_type_check
def parse_bytes(name: str, value: int | str) -> int:
    """Bytes meant by a number or by text such as "64 GiB" or "500MB".

    Raises:
        ValueError: not such a number, or negative.
    """
    number: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", value)
        if match and match[2].upper() in _UNITS:
            number = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    if number is None or number < 0 or number != number:
        raise ValueError(
            f"{name}={value!r} must be a number of bytes of at least 0,"
            ' or text such as "64 GiB"'
        )
    return int(number)
