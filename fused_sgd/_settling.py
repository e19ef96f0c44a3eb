"""What a step needs beside the plan: parameters judged and converted, errors raised, steps without a kernel."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from fused_sgd._elsewhere import step_elsewhere
from fused_sgd._hyperparameters import check_foreach, check_grad_scale, check_numbers, check_same, check_storage
from fused_sgd._judge import gradient, judge, place, state_tensor, too_large_message, unsound_state
from fused_sgd._native import C
from fused_sgd._new_state import new_state
from fused_sgd._norms import Found, Reduce, TrustRatio, squares
from fused_sgd._precision import convert, drop_cast, refresh_masters
from fused_sgd._state import State
from fused_sgd.reference import accumulation_dtype
from torch import Tensor
from torch.optim.optimizer import Optimizer

if C is not None:
    plan_step = C.step
else:

    def plan_step(*arguments: Any) -> tuple[str]:
        return ("no plan",)


def overflowed(found_inf: Any) -> bool:
    """Whether the step is to be skipped. GradScaler sums over devices: anything but 0 means an overflow."""
    return found_inf is not None and float(found_inf) != 0


def _replace(dictionary: dict[Any, Any], content: dict[Any, Any]) -> None:
    dictionary.clear()
    dictionary.update(content)


class Settling(Optimizer):
    """The part of FusedSGD that is called where Plan::step() (csrc/torch/plan.h) answers anything but None."""

    _plan: Any  # None without the compiled module
    _reduce: Reduce | None
    _skipped: int  # steps, by skip_nonfinite and on the CPU
    _found: Found | None
    _undo: list[Callable[[], Any]]  # brings back what this step has changed of the state, for when it is none

    def _settle(
        self, rest: tuple[Any, ...], grad_scale: Tensor | float | None, found_inf: Tensor | float | None
    ) -> None:
        """Does what the plan could not: judges, raises, or steps the parameters that no kernel takes."""
        self._undo = []
        try:
            self._do_rest(rest, grad_scale, found_inf)
        except BaseException:
            self._take_back()
            raise

    def _do_rest(
        self, rest: tuple[Any, ...], grad_scale: Tensor | float | None, found_inf: Tensor | float | None
    ) -> None:
        def again(elsewhere: Tensor | None = None) -> tuple[Any, ...] | None:
            groups, state = self.param_groups, self.state
            answered: tuple[Any, ...] | None
            answered = plan_step(self._plan, groups, state, grad_scale, found_inf, self._reduce, elsewhere)
            return answered

        answer: tuple[Any, ...] | None = rest
        if rest[0] == "state":  # someone put another dict there
            self.state = State(self._plan, self.state)
            answer = again()
        if answer is not None and answer[0] == "written":
            self._refresh(answer[1], self._undo)
            for group, index in answer[1]:
                self._plan.refreshed(group, index)
            answer = again()
        if answer is not None and answer[0] == "judge":
            self._admit(answer[1])
            answer = again()
        if answer is not None and answer[0] in ("scalars", "mode", "no plan"):
            # Not everything is stepped where these stand, so the host must know them; that waits for the GPU.
            if overflowed(found_inf):
                self._forget_norms()
                self._take_back()
                return
            grad_scale, found_inf = check_grad_scale(grad_scale), None if found_inf is None else 0.0
            answer = again()
        if answer is not None and answer[0] == "norms":
            answer = again(squares(self._gradients(answer[1]), grad_scale))
        if answer is None:
            self._undo.clear()
        elif answer[0] == "skipped":
            self._skip()
        elif answer[0] == "elsewhere":
            self._undo.clear()
            ratios = step_elsewhere(self.param_groups, self.state, answer[1], grad_scale, self._find_totals())
            self._found = Found(self._calls(), None, ratios)
        elif answer[0] in ("mode", "no plan"):
            if answer[0] == "mode" and any(group["fused"] for group in self.param_groups):
                raise RuntimeError("`fused=True` cannot be honoured under an active TorchDispatchMode; use fused=None")
            self._step_without_plan(grad_scale, found_inf is not None)
        else:
            self._refuse(*answer)

    def _gradients(self, entries: list[tuple[int, int]]) -> list[Tensor]:
        """The gradients of parameters, in the dtypes that those are computed in."""
        params = [self.param_groups[group]["params"][index] for group, index in entries]
        return [gradient(param).to(accumulation_dtype(param.dtype)) for param in params]

    def _step_without_plan(self, grad_scale: Tensor | float | None, checked: bool) -> None:
        """A step in which no kernel takes part; ``checked`` if a GradScaler has looked for what is not finite."""
        entries = self._judge_all()
        options = self.param_groups[0] if self.param_groups else self.defaults
        if "trust_coeff" in options and self._reduce is not None:
            raise RuntimeError("FusedLARS with shards in several processes needs a kernel for each parameter")
        totals = None
        looks = options["skip_nonfinite"] and not checked
        if options["max_grad_norm"] is not None or looks or "trust_coeff" in options:
            totals = squares(self._gradients(entries), grad_scale)
            if self._reduce is not None:
                self._reduce(totals)
        ratios = []
        if options["skip_nonfinite"] and totals is not None and totals[1] != 0:
            self._skip()
        else:
            self._undo.clear()
            ratios = step_elsewhere(self.param_groups, self.state, entries, grad_scale, totals)
        self._found = Found(self._calls(), totals, ratios)

    def _skip(self) -> None:
        self._skipped += 1
        self._take_back()

    def _take_back(self) -> None:
        """The state becomes what it was before a step that wrote nothing else."""
        if not self._undo:
            return
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self._plan is not None:
            self._plan.forget()  # its judgements are of the state as it was meant to be

    def _calls(self) -> int | None:
        calls: int | None = None if self._plan is None else self._plan.calls()
        return calls

    def _refuse(self, what: str, *details: Any) -> NoReturn:
        """Raises the error for what the plan found."""
        groups = self.param_groups
        if what == "invalid":
            group, _ = details
            check_numbers(groups[group], f" (param group {group})")
        elif what == "differ":
            check_same(groups)
        elif what == "too large":
            group, key, index = details
            raise RuntimeError(too_large_message(groups, group, index, key))
        elif what == "freed":
            group, index, role = details
            raise RuntimeError(
                f"{place(groups, group, index)}: the storage of its {role} is smaller than the tensor; it was freed or"
                " resized after the tensor was made"
            )
        elif what == "overlap":
            (group, index, role), (other_group, other_index, other_role) = details
            advice = "Give the optimizer each tensor once, and tied weights as one parameter"
            if "gradient" in (role, other_role):
                advice = "Clone the gradient"
            raise RuntimeError(
                f"the {role} of {place(groups, group, index)} shares memory with the {other_role} of"
                f" {place(groups, other_group, other_index)}; a step cannot write one without changing the other."
                f" {advice}"
            )
        raise AssertionError(f"the plan did not settle: {what} {details}")

    def _admit(self, entries: list[tuple[int, int]]) -> None:
        """Judges parameters for the plan; all of them before the plan hears of any."""
        admissions = []
        states = {}
        for group, index in entries:
            param = self.param_groups[group]["params"][index]
            states[param] = self._converted(group, index)
            judgement = judge(self.param_groups, group, index, {param: states[param][0]})
            new = {
                key: new_state(key, param, self.param_groups, group)
                for key, *_ in judgement.keys
                if state_tensor({param: states[param][0]}, param, key) is None
            }
            admissions.append((group, index, judgement.combination, judgement.keys, judgement.is_copy, new or None))
        assert self._plan is not None
        self._take_converted(states)
        self._refresh([(group, index) for group, index, *_, is_copy, _ in admissions if is_copy], self._undo)
        for admission in admissions:
            self._plan.admit(*admission)

    def _converted(self, group: int, index: int) -> tuple[Any, list[str]]:
        """A parameter's state in the formats that its group asks for, for the judge to see, and what was converted.

        It becomes the optimizer's only when every parameter was judged.
        """
        options = self.param_groups[group]
        check_foreach(options, f" (param group {group})")
        check_storage(options, f" (param group {group})")
        param = options["params"][index]
        kept = self.state.get(param)
        if not isinstance(kept, dict):
            return kept, []
        kept = dict(kept)
        return kept, convert(options, param, kept)

    def _take_converted(self, states: dict[Tensor, tuple[Any, list[str]]]) -> None:
        said: list[str] = []
        for param, (kept, changes) in states.items():
            if changes:
                inner = self.state[param]
                self._undo.append(functools.partial(_replace, inner, dict(inner)))
                _replace(inner, kept)
                said += changes
        self._say_converted(said)

    def _refresh(self, entries: list[tuple[int, int]], undo: list[Callable[[], Any]] | None = None) -> None:
        """Takes over what was written into parameters, into the masters of those that have one."""
        pairs = []
        for group, index in entries:
            master = self._sound_state(group, index, "master")
            if master is not None:
                pairs.append((self.param_groups[group]["params"][index], master))
        if undo is not None:
            undo += [functools.partial(master.copy_, master.clone()) for _, master in pairs]
        refresh_masters(pairs)

    def _sound_state(self, group: int, index: int, key: str) -> Tensor | None:
        """A tensor of a parameter's state, if it is there; raises RuntimeError where it cannot be the parameter's."""
        param = self.param_groups[group]["params"][index]
        tensor = state_tensor(self.state, param, key)
        if tensor is not None and (problem := unsound_state(key, tensor, param, param)):
            raise RuntimeError(f"{place(self.param_groups, group, index)}: {problem}")
        return tensor

    def _judge_all(self) -> list[tuple[int, int]]:
        """Judges every parameter that has a gradient; for steps without a plan."""
        entries = []
        states: dict[Tensor, tuple[Any, list[str]]] = {}
        seen: set[Tensor] = set()
        check_same(self.param_groups)
        for group, options in enumerate(self.param_groups):
            check_numbers(options, f" (param group {group})")
            for index, param in enumerate(options["params"]):
                if param in seen:
                    raise RuntimeError(f"{place(self.param_groups, group, index)} is in the optimizer twice")
                seen.add(param)
                if param.grad is not None:
                    states[param] = self._converted(group, index)
                    judge(self.param_groups, group, index, {param: states[param][0]})
                    entries.append((group, index))
        self._take_converted(states)
        return entries

    def _forget_norms(self) -> None:
        """What an earlier step found is not of the last one any more."""
        self._found = None
        if self._plan is not None:
            self._plan.forget_norms()

    def _last_found(self) -> Found | None:
        return self._found if self._found is not None and self._found.calls == self._calls() else None

    def _find_totals(self) -> Tensor | None:
        totals: Tensor | None = None if self._plan is None else self._plan.totals()
        found = self._last_found()
        return found.totals if totals is None and found is not None else totals

    def _find_ratios(self) -> list[TrustRatio]:
        """The trust ratios of what the last step left to Python, as fresh tensors."""
        found = self._last_found()
        rows = [] if found is None else found.ratios
        tensors = ("param_norm", "grad_norm", "ratio")
        return [row._replace(**{key: getattr(row, key).clone() for key in tensors}) for row in rows]

    def _convert_all(self) -> None:
        said: list[str] = []
        for options in self.param_groups:
            for param in options["params"]:
                kept = self.state.get(param)
                if isinstance(kept, dict):
                    # Master weights wait for the next step: the model may be loaded after its optimizer.
                    said += drop_cast(kept)
                    said += convert(options, param, kept, masters=False)
        self._say_converted(said)

    @staticmethod
    def _say_converted(said: list[str]) -> None:
        for what, count in Counter(said).items():
            parameters = "parameter" if count == 1 else "parameters"
            warnings.warn(f"fused_sgd: {what}, of {count} {parameters}", stacklevel=4)
