"""LLaVA-1.5's projector: linear, erf GELU, linear, both with bias (Liu et al. 2023, arXiv:2310.03744)."""

from __future__ import annotations

from megatron_patch.families.table import Family, column, replicated, row

PROJECTOR = Family(
    name="projector",
    weights=(
        column("encoder.linear_fc1.weight", "linear_1.weight"),
        column("encoder.linear_fc1.bias", "linear_1.bias"),
        row("encoder.linear_fc2.weight", "linear_2.weight"),
        replicated("encoder.linear_fc2.bias", "linear_2.bias"),
    ),
    activation="gelu",  # the exact one
)
