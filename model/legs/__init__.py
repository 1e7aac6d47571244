"""HiPPO-LegS projections: frames at real times to coefficients of a path, and the path read at any time."""

from model.legs.basis import basis_torch, derivative_torch
from model.legs.projection import (
    METHODS,
    basis,
    basis_derivative,
    checked_times,
    derivative,
    evaluate,
    project,
    projection_matrix,
    recurrence_matrices,
)

__all__ = [
    "METHODS",
    "basis",
    "basis_derivative",
    "basis_torch",
    "checked_times",
    "derivative",
    "derivative_torch",
    "evaluate",
    "project",
    "projection_matrix",
    "recurrence_matrices",
]
