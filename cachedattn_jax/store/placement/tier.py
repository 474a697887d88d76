"""The memories that pages can lie in."""

import enum


class Tier(enum.StrEnum):
    """A memory that holds pages, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


# Iterating over an enum costs a microsecond, and this is done at every turn.
TIERS = tuple(Tier)
