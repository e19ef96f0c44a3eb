"""SGD for PyTorch: one pass over memory does weight decay, momentum, Nesterov and the step, for every tensor at once."""

from fused_sgd._version import __version__
from fused_sgd.optimizer import FusedSGD

__all__ = ["FusedSGD", "__version__"]
