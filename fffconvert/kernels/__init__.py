"""The one door to the arithmetic of a fast feedforward layer."""

from __future__ import annotations

from fffconvert.kernels.reference import ACTIVATIONS, FFFWeights, fff_forward, route

__all__ = ["ACTIVATIONS", "FFFWeights", "fff_forward", "route"]
