"""The step under torch.compile: one operator, ``torch.ops.fused_sgd.step_``, and what Dynamo traces around it.

The operator is a function of its arguments: of tensors, numbers, and a description of each param group. An optimizer
gives its handle as well, and where the tensors are that optimizer's own it is the one that steps, with its plan.
Anything else (copies, as compilers make them that cannot write in place) is stepped by an optimizer made for it.
"""

from __future__ import annotations

import functools
import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fused_sgd._judge import judge, name_of, place, state_tensor, state_tensors
from fused_sgd._new_state import new_state
from fused_sgd._norms import Found
from fused_sgd._precision import Group, storage
from fused_sgd._settling import Settling
from torch import Tensor

# Options that are numbers, in the order of the operator's argument. Dynamo lets them change without compiling anew.
NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "max_grad_norm", "ema_decay", "trust_coeff", "eps")
# All others. They are part of what is compiled.
CONSTANTS = (
    "nesterov",
    "maximize",
    "foreach",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "skip_nonfinite",
    "momentum_dtype",
    "master_weights",
    "stochastic_rounding",
    "trust_clip",
    "always_adapt",
    "lr_in_momentum",
)

_handles = itertools.count(1)
_optimizers: weakref.WeakValueDictionary[int, Traced] = weakref.WeakValueDictionary()


class Traced(Settling):
    """The part of FusedSGD that Dynamo traces instead of its ``step()``."""

    _handle: int  # the operator's name for this optimizer
    _holds_averages: bool
    _step_itself: Callable[..., Any]  # step() without hooks
    _step_outside: Callable[..., Any]  # the same, of which Dynamo compiles nothing

    def _take_handle(self) -> None:
        self._handle = next(_handles)
        _optimizers[self._handle] = self

    def _traced_step(self, closure: Callable[[], float] | None = None) -> float | None:
        """What ``step()`` is to Dynamo."""
        if closure is not None:
            return self._leave_graph("its closure runs outside the graph", closure)
        if self._holds_averages:
            return self._leave_graph("it is inside swap_ema()")
        if hasattr(self, "found_inf") or hasattr(self, "grad_scale"):
            return self._leave_graph("there is a grad_scale, from a GradScaler or set by hand")
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[Tensor] = []
        scalars: list[Tensor] = []
        numbers: list[float] = []
        groups: list[str] = []
        for options in self.param_groups:
            its_params: list[Tensor] = []
            its_grads: list[Tensor] = []
            its_states: list[Tensor] = []
            obstacles: list[str] = []
            description = self._init_group(options, its_params, its_grads, its_states, obstacles, _constants(options))
            if obstacles:
                return self._leave_graph(obstacles[0])
            params.extend(its_params)
            grads.extend(its_grads)
            states.extend(its_states)
            values = [options.get(key) for key in NUMBERS]
            scalars.extend([value for value in values if isinstance(value, Tensor)])
            numbers.extend([0.0 if value is None or isinstance(value, Tensor) else float(value) for value in values])
            groups.append(description)
        with torch.no_grad():
            one = torch.ones((), dtype=torch.float64, device="cpu")
            # As products of a tensor, Dynamo keeps numbers that change out of what is compiled.
            table = torch.stack([one * number for number in numbers])
            torch.ops.fused_sgd.step_(params, grads, states, scalars, table, groups, self._handle)
        return None

    def _init_group(
        self,
        options: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        obstacles: list[str],
        constants: tuple[Any, ...],
    ) -> str:
        """Fills the lists with what one param group has to be stepped, and makes the state that is not there yet.

        Dynamo knows a method of this name and does not trace it: it is called while the step is compiled, with the
        group as it is, and again whenever anything in it, or in the state, has become another.

        Args:
            options: the param group.
            params: a list to fill.
            grads: likewise.
            states: likewise, with all state tensors of each parameter.
            obstacles: likewise, with the reason why the group must not be traced, if there is one.
            constants: what _constants() says of the group, as the code that is traced has it at this point.

        Returns:
            The group's description for the operator.
        """
        if constants != _constants(options):  # the change becomes real only when the graph was left
            obstacles.append("an option that is no number was changed before it")
            return ""
        if options["differentiable"]:
            obstacles.append("differentiable=True")
            return ""
        indices, keys = [], []
        for index, param in enumerate(options["params"]):
            if param.grad is None:
                continue
            if obstacle := _obstacle(options, param, param.grad):
                obstacles.append(f"{name_of(options, index) or f'parameter {index}'}: {obstacle}")
                return ""
            try:
                self._make_state(options, index)
                kept = state_tensors(options, param, self.state)
            except TypeError:
                obstacles.append("a state that is no dict")
                return ""
            there = {key: tensor for key, tensor in kept.items() if tensor is not None}
            params.append(param)
            grads.append(param.grad)
            states.extend(there.values())
            indices.append(index)
            keys.append([*there])
        try:
            return _describe(options, indices, keys)
        except TypeError:
            obstacles.append("an option is nothing plain")
            return ""

    def _make_state(self, options: Group, index: int) -> None:
        group = next(number for number, one in enumerate(self.param_groups) if one is options)
        param = options["params"][index]
        try:
            kept, said = self._converted(group, index)
            judge(self.param_groups, group, index, {param: kept})
        except (RuntimeError, TypeError, ValueError):
            return  # and the step will say so
        self._take_converted({param: (kept, said)})
        for key, tensor in state_tensors(options, param, self.state).items():
            if tensor is None:
                self.state[param][key] = new_state(key, param, self.param_groups, group)

    def _leave_graph(self, why: str, closure: Callable[[], float] | None = None) -> float | None:
        torch._dynamo.graph_break(msg=f"FusedSGD.step() leaves the graph: {why}")
        result: float | None = self._step_outside(closure)
        return result

    def _owns(self, params: list[Tensor], states: list[Tensor], groups: list[dict[str, Any]]) -> bool:
        """Whether these are this optimizer's own tensors, each in its place."""
        if len(groups) != len(self.param_groups):
            return False
        its_params, its_states = iter(params), iter(states)
        for options, described in zip(self.param_groups, groups, strict=True):
            own = options["params"]
            for index, keys in zip(described["indices"], described["keys"], strict=True):
                param = next(its_params)
                if index >= len(own) or own[index] is not param:
                    return False
                kept = self.state.get(param)
                for key in keys:
                    if kept is None or kept.get(key) is not next(its_states):
                        return False
        return True

    def _adopt_findings(self, made: Any, described: list[dict[str, Any]]) -> None:
        """Tells of the step of an optimizer that _make_optimizer() made as of its own."""
        ratios = []
        for row in getattr(made, "trust_ratios", list)():
            index = described[row.group]["indices"][row.parameter]
            name = name_of(self.param_groups[row.group], index)
            ratios.append(row._replace(parameter=index, name=name))
        self._forget_norms()
        self._skipped += made.skipped_steps
        self._found = Found(self._calls(), made._find_totals(), ratios)

    @contextmanager
    def _given(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        options: list[dict[str, Any]],
    ) -> Iterator[None]:
        """Has these gradients and options inside, and the optimizer's own ones again afterwards."""
        given = dict(zip(map(id, params), grads, strict=True))
        changed = []
        for group, its_options in zip(self.param_groups, options, strict=True):
            for key, value in its_options.items():
                if group[key] is not value and (isinstance(value, Tensor) or group[key] != value):
                    changed.append((group, key, group[key]))
                    group[key] = value
        moved = []
        try:
            for group in self.param_groups:
                for param in group["params"]:
                    grad = given.get(id(param))
                    if param.grad is not grad:
                        moved.append((param, param.grad))
                        param.grad = grad
            yield
        finally:
            for param, grad in moved:
                param.grad = grad
            for group, key, value in changed:
                group[key] = value


def _constants(options: Group) -> tuple[Any, ...]:
    """What of a param group is compiled in."""
    momentum = "some momentum" if options["momentum"] != 0 else "none"  # a branch, so that Dynamo looks
    return (*[options.get(key) for key in CONSTANTS], momentum)


def _obstacle(options: Group, param: Tensor, grad: Tensor) -> str:
    """Why a parameter cannot be stepped in a graph, or an empty string."""
    for tensor in (param, grad):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return f"a {type(tensor).__name__}, {tensor.layout}"
        if tensor.is_complex():
            return "Inductor cannot give complex tensors to an operator that writes lists"
    if storage(options, param).beside == "master":
        # Compiled code counts every write of a graph as one more version of the parameter. So each step would look at
        # each element for what someone else has written, which takes many times longer than the step.
        return 'float32 masters; master_weights="split" has the same values'
    return ""


# --- The operator -----------------------------------------------------------------------------------------------------


def _describe(options: Group, indices: list[int], keys: list[list[str]]) -> str:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, torch.dtype) else value

    numbers = [key for key in NUMBERS if options.get(key) is not None]
    described = {
        "indices": indices,  # of the parameters
        "names": [name_of(options, index) or f"parameter {index}" for index in indices],
        "keys": keys,  # of their state
        "numbers": [key for key in numbers if not isinstance(options[key], Tensor)],
        "scalars": [key for key in numbers if isinstance(options[key], Tensor)],
        "constants": {key: plain(options[key]) for key in CONSTANTS if key in options},
    }
    return json.dumps(described)


@functools.lru_cache(maxsize=256)
def _parse(description: str) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(description)
    constants = described["constants"]
    for key, value in constants.items():
        if isinstance(value, str) and value.startswith("torch."):
            constants[key] = getattr(torch, value.removeprefix("torch."))
    return described


def _options(described: list[dict[str, Any]], scalars: list[Tensor], numbers: Tensor) -> list[dict[str, Any]]:
    """The options that may differ from call to call, of each group."""
    rest = iter(scalars)
    rows = numbers.reshape(len(described), len(NUMBERS)).tolist()
    return [
        {key: row[NUMBERS.index(key)] for key in group["numbers"]} | {key: next(rest) for key in group["scalars"]}
        for group, row in zip(described, rows, strict=True)
    ]


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scalars: list[Tensor],
    numbers: Tensor,
    groups: list[str],
    optimizer: int = 0,
) -> None:
    """``torch.ops.fused_sgd.step_``: steps ``params`` and ``states``, in place.

    Args:
        params: the parameters that have a gradient, of all groups.
        grads: their gradients.
        states: their state tensors, in the order of each group's ``keys``.
        scalars: hyperparameters that are tensors, in the order of each group's ``scalars``.
        numbers: those that are numbers: float64, a row of ``NUMBERS`` for each group.
        groups: what _describe() says of each.
        optimizer: the handle of the one whose tensors these may be, or 0.
    """
    described = [_parse(description) for description in groups]
    for name, found, wanted in (
        ("params", len(params), sum(len(group["keys"]) for group in described)),
        ("grads", len(grads), len(params)),
        ("states", len(states), sum(len(keys) for group in described for keys in group["keys"])),
        ("scalars", len(scalars), sum(len(group["scalars"]) for group in described)),
        ("numbers", numbers.numel(), len(NUMBERS) * len(groups)),
    ):
        if found != wanted:
            raise ValueError(f"fused_sgd::step_: `{name}` has {found} elements, and the groups describe {wanted}")
    options = _options(described, scalars, numbers)
    owner = _optimizers.get(optimizer)
    if owner is not None and owner._owns(params, states, described):
        with owner._given(params, grads, options):
            owner._step_itself()
        return
    made = _make_optimizer(params, grads, states, described, options)
    if owner is not None:
        made._reduce = owner._reduce
    made._step_itself()
    if owner is not None:
        owner._adopt_findings(made, described)


def _make_optimizer(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    described: list[dict[str, Any]],
    options: list[dict[str, Any]],
) -> Traced:
    """An optimizer for tensors that belong to none; it keeps nothing that was not given."""
    import fused_sgd  # which imports this module

    its_params, its_grads, its_states = iter(params), iter(grads), iter(states)
    groups, state = [], {}
    for group, numbers in zip(described, options, strict=True):
        members = []
        for name, keys in zip(group["names"], group["keys"], strict=True):
            param = next(its_params).detach()  # which shares its memory and version
            param.grad = next(its_grads)
            state[param] = {key: next(its_states) for key in keys}
            members.append((name, param))
        groups.append({"params": members, **group["constants"], **numbers})
    is_lars = any("trust_coeff" in group for group in groups)
    made = fused_sgd.FusedLARS(groups) if is_lars else fused_sgd.FusedSGD(groups)
    made.state.update(state)
    for number, group in enumerate(made.param_groups):
        for index, param in enumerate(group["params"]):
            for key in state_tensors(group, param, made.state):
                judge(made.param_groups, number, index, made.state)
                if state_tensor(made.state, param, key) is None:
                    raise RuntimeError(f"{place(made.param_groups, number, index)}: there is no {key} among the states")
    return made


torch.library.define(
    "fused_sgd::step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor[] scalars, Tensor numbers, str[] groups,"
    " int optimizer=0) -> ()",
    tags=[
        torch.Tag.cudagraph_unsafe,  # a replay would not see that a learning rate was changed
        torch.Tag.needs_exact_strides,
    ],
)
torch.library.impl("fused_sgd::step_", "CompositeExplicitAutograd", _step)
torch.library.register_fake("fused_sgd::step_", lambda *arguments: None)
