"""What curves of finer sites are called: in words, and in tags and files."""

from __future__ import annotations

from collections.abc import Sequence

from align_audit.record.site_curve import SiteCurve


def site_name(curve: SiteCurve) -> str:
    """A curve of finer sites in words: what was swapped, and where."""
    names = {"attention_output": "attention output", "mlp_output": "MLP output", "head": "heads", "block": "blocks"}
    name = names[curve.site] if curve.width == 1 else f"windows of {curve.width} layers"
    return name if curve.positions == "all" else f"{name}, {curve.positions.replace('_', ' ')}"


def site_names(curves: Sequence[SiteCurve]) -> list[str]:
    """A short name for each curve, for tags and files: its site, with what sets it apart from the usual and the others.

    Example:
        ``["head", "block_width_2", "head_prompt_attribution", "head_again_2"]``
    """
    names: list[str] = []
    for curve in curves:
        name: str = curve.site
        if curve.width != 1:
            name += f"_width_{curve.width}"
        if curve.positions != "all":
            name += f"_{curve.positions}"
        if curve.estimator != "exact":
            name += f"_{curve.estimator}"
        same = sum(earlier == name or earlier.startswith(f"{name}_again_") for earlier in names)
        names.append(f"{name}_again_{same + 1}" if same else name)
    return names
