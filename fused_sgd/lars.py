"""FusedLARS: layer-wise adaptive rate scaling, for large batches."""

from __future__ import annotations

from typing import Any

import torch
from fused_sgd._judge import name_of
from fused_sgd._norms import TrustRatio
from fused_sgd.optimizer import FusedSGD
from fused_sgd.reference import clip_coefficient, trust_ratio
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT


class FusedLARS(FusedSGD):
    """SGD with a trust ratio for each parameter, in the same pass.

    LARS of You et al., `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_.
    Arguments and numbers are those of timm's ``Lars``, to rounding. See :func:`fused_sgd.reference.trust_ratio` for the
    formula. Biases and norms are usually left without weight decay, and so without adaptation: see
    :func:`fused_sgd.param_groups`.

    Arguments not listed here are those of :class:`FusedSGD`; norms are taken after clipping, and ``foreach=True`` is
    refused.

    Args:
        params: parameters, named parameters, or dicts that define param groups.
        lr: learning rate.
        momentum: momentum factor.
        dampening: part of the gradient kept out of the momentum buffer, from a parameter's second step on.
        weight_decay: L2 penalty, which takes part in the trust ratio.
        nesterov: whether to use Nesterov momentum; needs ``momentum > 0`` and ``dampening == 0``.
        trust_coeff: trust coefficient.
        eps: added to the ratio's denominator.
        trust_clip: LARC: the ratio is divided by ``lr`` and held at 1, so that no parameter learns faster than ``lr``.
        always_adapt: whether parameters without weight decay adapt, too.
        lr_in_momentum: whether the momentum buffer accumulates what was multiplied by the learning rate, as in the
            paper and in MLPerf's reference; timm multiplies afterwards.
        decoupled_weight_decay: refused; here because optimizers are rebuilt from their defaults.

    Raises:
        ValueError: a hyperparameter is out of range or NaN, or a parameter is given twice.
        RuntimeError: options that exclude each other.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        lr_in_momentum: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        momentum_dtype: torch.dtype | None = None,
        master_weights: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        ema_decay: float | None = None,
        norm_process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coeff": trust_coeff,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "lr_in_momentum": lr_in_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "ema_decay": ema_decay,
        }
        self._start(params, defaults, norm_process_group)

    def trust_ratios(self) -> list[TrustRatio]:
        """Norms and trust ratio of each parameter that the last step took, for logging.

        Those of a kernel's step are computed from the norms it has left, without waiting for the GPU, and with the
        options it had. Only a tensor ``lr`` or ``weight_decay`` on a GPU is read anew. Groups are numbered as they were
        then. Names are those of named parameters, as :func:`fused_sgd.param_groups` gives them. Parameters without
        elements are left out, and so are all after a step that failed, or of which the host knows that it was skipped.
        """
        rows = self._find_ratios()
        norm = super().grad_norm
        names = {
            id(param): name_of(options, index)
            for options in self.param_groups
            for index, param in enumerate(options["params"])
        }
        found = [] if self._plan is None else self._plan.row_squares()
        for group, index, param, squares, max_grad_norm, options in found:
            param_norm, grad_norm = squares.sqrt().unbind()
            if max_grad_norm and norm is not None:
                grad_norm = grad_norm * clip_coefficient(norm, max_grad_norm).to(grad_norm.device)
            ratio = trust_ratio(param_norm, grad_norm, **options)
            rows.append(TrustRatio(group, index, param_norm, grad_norm, ratio, names.get(id(param))))
        return sorted(rows, key=lambda row: (row.group, row.parameter))

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm of the gradients of the last step, as for :class:`FusedSGD`: LARS always needs norms."""
        norm = super().grad_norm
        if norm is not None or self._last_found() is None:
            return norm
        rows = self.trust_ratios()
        if not rows:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([row.grad_norm.to(rows[0].grad_norm.device) for row in rows]).square().sum().sqrt()


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The usual split: weights with decay, biases and the parameters of norms (all of one dimension) without.

    Without weight decay, :class:`FusedLARS` does not adapt either, unless ``always_adapt``.

    Args:
        model: whose parameters, those that require gradients.
        weight_decay: of the first group.

    Returns:
        Two param groups of named parameters, to give to an optimizer; a group without parameters is left out.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [(name, param) for name, param in named if param.dim() > 1], "weight_decay": weight_decay},
        {"params": [(name, param) for name, param in named if param.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
