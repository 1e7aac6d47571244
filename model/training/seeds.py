"""Seeds that depend on what they are for, and on nothing else."""

from __future__ import annotations


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several whole numbers."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = ((mixed ^ (part & (2**64 - 1))) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 1
