"""Whether a codec's latents depend on the caption, by its spec alone: loads nothing, not even torch."""

from __future__ import annotations

from collections.abc import Mapping


def inverts_with_text(spec: Mapping[str, object]) -> bool:
    """Whether frames become other latents under another caption: a diffusers codec that inverts (its UNet reads it)."""
    return spec.get("kind") == "diffusers" and spec.get("inversion_depth", 50) != 0
