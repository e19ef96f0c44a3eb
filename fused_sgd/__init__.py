"""SGD for PyTorch: one pass does weight decay, momentum, Nesterov and the step, for every tensor at once."""

import warnings

from fused_sgd._native import C, why_missing
from fused_sgd._version import __version__
from fused_sgd.lars import FusedLARS, param_groups
from fused_sgd.optimizer import FusedSGD

__all__ = ["FusedLARS", "FusedSGD", "__version__", "param_groups"]

if C is None:
    warnings.warn(
        f"fused_sgd runs without its compiled module, on the slower reference path: {why_missing}",
        RuntimeWarning,
        stacklevel=2,
    )
