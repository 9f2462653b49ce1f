"""Parameter groups: which parameters get which learning rate and weight decay, and when.

An option (`lr`, `weight_decay`, ...) is a list of rules. A rule has a schedule and may select parameters by shell pattern
(`param_names`) or by exact module class (`module_cls_names`); a rule without either is the option's default. Groups are the
intersections of the options' rules, so every parameter is in exactly one.
"""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omnivision.config.schema import RuleSettings
from omnivision.distributed.fsdp import distribute_like, local_tensor
from omnivision.optim.schedules import Scaled, Schedule, peak
from omnivision.utils.errors import UserError, truncate_list


@dataclass
class ParamGroup:
    """Parameters that share all schedules. `factors` multiply options: layer decay, a grid of probes."""

    names: list[str]
    schedules: dict[str, Schedule] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)  # by option

    def value(self, option: str, progress: float) -> float:
        """Return an option's value when a share `progress` of all steps is done."""
        return self.schedules[option](progress) * self.factors.get(option, 1.0)


def parameter_groups(
    model: nn.Module,
    options: Mapping[str, Sequence[RuleSettings]],
    schedules: Mapping[str, Sequence[Schedule]],
    factors: Mapping[str, Mapping[str, float]] | None = None,
) -> list[ParamGroup]:
    """Return the groups of a model's trainable parameters, in a fixed order.

    Args:
        options: the rules of each option.
        schedules: one per rule.
        factors: by option, factors by parameter.

    Raises UserError when a rule matches nothing, when two rules of an option overlap, or when an option has two defaults.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = {option: _rules_by_parameter(model, names, option, rules) for option, rules in options.items()}
    groups: dict[tuple, ParamGroup] = {}
    for name in names:
        scales = {option: own[name] for option, own in (factors or {}).items() if own.get(name, 1.0) != 1.0}
        key = (*(chosen[option].get(name) for option in options), *scales.items())
        if key not in groups:
            own = {option: schedules[option][chosen[option][name]] for option in options if name in chosen[option]}
            groups[key] = ParamGroup([], own, scales)
        groups[key].names.append(name)
    return list(groups.values())


def scale_learning_rates(
    rules: Sequence[RuleSettings], schedules: Sequence[Schedule], lr: float | None, lr_scale_factor: float
) -> list[Schedule]:
    """Divide learning-rate schedules by `lr_scale_factor`; or, with `lr`, scale all so that the default rule's peaks at `lr`.

    Raises UserError for a schedule without a positive value.
    """
    if lr is None:
        return [Scaled(schedule, 1 / lr_scale_factor) for schedule in schedules]
    defaults = [schedule for rule, schedule in zip(rules, schedules, strict=True) if is_default(rule)]
    highest = peak([*defaults, *schedules][0])
    if highest <= 0:
        raise UserError(
            f"trainer.optim.options.lr must rise above 0 to be scaled to lr, got {highest:g} at most. Set lr=null."
        )
    return [Scaled(schedule, lr / highest) for schedule in schedules]


def is_default(rule: RuleSettings) -> bool:
    return rule.param_names is None and rule.module_cls_names is None


def _rules_by_parameter(
    model: nn.Module, names: list[str], option: str, rules: Sequence[RuleSettings]
) -> dict[str, int]:
    """Return the number of the rule that each parameter follows; parameters that no rule covers are left out."""
    where = f"trainer.optim.options.{option}"
    defaults = [number for number, rule in enumerate(rules) if is_default(rule)]
    if len(defaults) > 1:
        raise UserError(
            f"{where} must have at most one default rule (without param_names and module_cls_names), got numbers {defaults}. "
            "Set param_names of the others."
        )
    chosen: dict[str, int] = {}
    for number, rule in enumerate(rules):
        for name in sorted(_matches(model, names, f"{where}[{number}]", rule)):
            if name in chosen:
                raise UserError(f"{where}: rules {chosen[name]} and {number} both match {name}. Narrow one of them.")
            chosen[name] = number
    return {name: number for number in defaults for name in names} | chosen


def _matches(model: nn.Module, names: list[str], where: str, rule: RuleSettings) -> set[str]:
    """Return the parameters that a rule selects. Raises UserError for a pattern or class that selects none."""
    matches = {("param_names", pattern): fnmatch.filter(names, pattern) for pattern in rule.param_names or ()}
    for class_name in rule.module_cls_names or ():
        module, _, attribute = class_name.rpartition(".")
        cls = getattr(sys.modules.get(module), attribute, None)  # the model's classes are imported
        owners = {prefix for prefix, part in model.named_modules() if type(part) is cls}
        matches["module_cls_names", class_name] = [name for name in names if name.rpartition(".")[0] in owners]
    for (key, value), matched in matches.items():
        if not matched:
            classes = sorted({f"{type(part).__module__}.{type(part).__qualname__}" for part in model.modules()})
            raise UserError(
                f"{where}.{key}: {value!r} matches none of the {len(names)} trainable parameters ({truncate_list(names)}; "
                f"classes {', '.join(classes)}). Fix it, or remove it."
            )
    return {name for matched in matches.values() for name in matched}


def skip_compiler_import() -> None:
    """Keep torch's optimizers from importing its compiler, which took 2 s of a start of 6 s.

    They import it to exclude these methods from compilation, and mark excluded methods with this attribute. We never compile an
    optimizer.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method: Any = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        method.__dynamo_disable = method


class ScheduledOptimizer:
    """An optimizer whose groups get their options from schedules before every step."""

    def __init__(self, model: nn.Module, groups: list[ParamGroup], make: Any) -> None:
        """`make(params)` builds the optimizer, e.g. a partial of torch.optim.AdamW.

        Raises UserError for arguments that this optimizer does not take, and for an option that is not one of its numbers.
        """
        parameters = dict(model.named_parameters())
        self.groups = groups
        skip_compiler_import()
        try:
            self.optimizer: torch.optim.Optimizer = make(
                [{"params": [parameters[n] for n in group.names]} for group in groups]
            )
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"trainer.optim.optimizer cannot be built: {error}. Fix its arguments.") from error
        # The wrappers of torch's own step also import the compiler.
        step = type(self.optimizer).step
        self._step = inspect.unwrap(step) if step.__module__.startswith("torch.optim.") else step
        known = {name for name, value in self.optimizer.defaults.items() if type(value) in (int, float)}
        if unknown := {option for group in groups for option in group.schedules} - known:
            raise UserError(
                f"trainer.optim.options must be numeric options of {type(self.optimizer).__name__} "
                f"({', '.join(sorted(known))}), got {', '.join(sorted(unknown))}."
            )
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set the options of all groups; `progress` is the fraction of all steps done."""
        for group, target in zip(self.groups, self.optimizer.param_groups, strict=True):
            target.update({option: group.value(option, progress) for option in group.schedules})

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar on their device."""
        gradients = [local_tensor(p.grad) for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor.float())

    @torch.no_grad()
    def step(self, skip_step: Tensor) -> None:
        """Run one optimizer step, which changes nothing if `skip_step` (bool, a scalar on the device) is true.

        Fused optimizers read the flag on the device, through the attributes that torch's GradScaler sets; others make the host
        wait.
        """
        optimizer: Any = self.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, skip_step.float()
            try:
                self._step(optimizer)
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        elif not skip_step:
            self._step(optimizer)

    def rebind_parameters(self, model: nn.Module) -> None:
        """Optimize the model's current parameters of the same names, and shard the state like them."""
        parameters, state = dict(model.named_parameters()), self.optimizer.state
        for group, target in zip(self.groups, self.optimizer.param_groups, strict=True):
            now = [parameters[name] for name in group.names]
            for before, after in zip(target["params"], now, strict=True):
                if before in state and after is not before:
                    state[after] = {key: distribute_like(value, after) for key, value in state.pop(before).items()}
            target["params"] = now

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `optimizer.state_dict()`. Raises ValueError or KeyError for another optimizer or other groups."""
        own_groups = self.optimizer.state_dict()["param_groups"]
        for theirs, own in zip(state["param_groups"], own_groups, strict=False):  # torch checks their number
            if missing := own.keys() - theirs.keys():  # some optimizers, timm's Lamb, add their step to a group
                raise ValueError(f"options {', '.join(sorted(missing))} are not in it")
        self.optimizer.load_state_dict(state)

    @property
    def lr(self) -> float:
        """The largest learning rate of all groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def layer_decay_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return each parameter's learning-rate factor: head 1, last block decay, ..., patch embedding decay^(depth + 1).

    This is the convention of BEiT and VideoMAE: decay^(depth + 1 - id), with id 0 for the patch embedding, n + 1 for block n
    (`trunk.blocks`), and depth + 1 for everything after the blocks.
    """
    depth = len({name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("trunk.blocks.")})

    def layer(name: str) -> int:
        if name.startswith("trunk.patch_embed."):
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("trunk.blocks.") else depth + 1

    return {name: decay ** (depth + 1 - layer(name)) for name, _ in model.named_parameters()}
