"""What a run asks SLURM for: the settings under `submitit`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from omnivision.config.reader import Count, Natural, Positive, Range

# Of `dependency`: one, or several joined by commas or by question marks.
_ONE = r"((after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(:\d+(_(\d+|\*))?(\+\d+)?)+|singleton)"
_DEPENDENCY = rf"{_ONE}(,{_ONE})*|{_ONE}(\?{_ONE})+"
_MEMORY = r"(\d+)([KMGT]?)B?"
# Options of sbatch that a setting of ours stands for, and those that would break what is submitted.
_OPTIONS = {
    "job-name": "submitit.name",
    "partition": "submitit.partition",
    "account": "submitit.account",
    "qos": "submitit.qos",
    "time": "submitit.timeout_hour",
    "nodes": "launcher.num_nodes",
    "ntasks": "launcher.gpus_per_node",
    "ntasks-per-node": "launcher.gpus_per_node",
    "gpus-per-node": "launcher.gpus_per_node",
    "cpus-per-task": "submitit.cpus_per_task",
    "mem": "submitit.mem",
    "constraint": "submitit.constraints",
    "comment": "submitit.comment",
    "exclude": "submitit.exclude",
    "nodelist": "submitit.nodelist",
    "dependency": "submitit.dependency",
    "array": "a sweep (-m)",
}
_BREAKING = (
    "output error open-mode requeue no-requeue kill-on-invalid-dep wait parsable test-only wrap export chdir".split()
)


@dataclass
class SubmititSettings:
    use_cluster: bool
    name: str
    partition: str | None
    account: str | None
    qos: str | None
    timeout_hour: Annotated[float, Range(above=0, high=100_000)]
    cpus_per_task: Natural
    mem: str | None
    mem_gb: Positive | None
    constraints: str | None
    comment: str | None
    exclude: str | None
    nodelist: str | None
    dependency: str | None
    max_requeues: Count
    signal_delay_s: Annotated[int, Range(low=1, high=65_535)] | None
    setup: list[str]
    additional_parameters: dict[str, Any]

    @property
    def memory_gb(self) -> float | None:
        """What each node is asked for; None for nothing, and for all of it."""
        if self.mem is None:
            return self.mem_gb
        found = re.fullmatch(_MEMORY, self.mem, re.IGNORECASE)
        if found is None or found[1] == "0":
            return None
        return int(found[1]) * 1024.0 ** ("KMGT".index(found[2].upper() or "M") - 2)

    def contradictions(self) -> list[str]:
        """What SLURM would not take, or would take for something else: a sentence each."""
        problems = []
        if self.mem is not None and self.mem_gb is not None:
            problems.append(
                f"submitit.mem is {self.mem} and submitit.mem_gb is {self.mem_gb:g}; expected one of them. Set the other "
                "to null."
            )
        if self.mem is not None and not re.fullmatch(_MEMORY, self.mem, re.IGNORECASE):
            problems.append(
                f"submitit.mem is {self.mem!r}; expected what SLURM takes: a whole number of megabytes, or with K, M, G or T "
                "after it (submitit.mem_gb takes fractions). Change submitit.mem."
            )
        if self.dependency is not None and not re.fullmatch(_DEPENDENCY, self.dependency):
            problems.append(
                f"submitit.dependency is {self.dependency!r}; expected what SLURM takes, e.g. afterok:12, or afterok:12:13 to "
                "wait for both."
            )
        for name, value in vars(self).items():
            if isinstance(value, str) and not value.isprintable():
                problems.append(
                    f"submitit.{name} is {value!r}; expected one line of plain text. Change submitit.{name}."
                )
        if self.signal_delay_s is not None and self.signal_delay_s >= self.timeout_hour * 3600:
            problems.append(
                f"submitit.signal_delay_s is {self.signal_delay_s} and submitit.timeout_hour is {self.timeout_hour:g}: a run "
                "would be told to leave as soon as it starts. Expected fewer seconds than the limit has. Change one of them."
            )
        for name in self.additional_parameters:
            option = name.replace("_", "-")
            # sbatch takes beginnings of its options, too.
            option = next((full for full in (*_OPTIONS, *_BREAKING) if option and full.startswith(option)), option)
            instead = f"use {_OPTIONS[option]} instead" if option in _OPTIONS else "leave it out"
            if option in _OPTIONS or option in _BREAKING:
                problems.append(
                    f"submitit.additional_parameters.{name} is an option of sbatch that submissions set, or need unset; "
                    f"{instead}."
                )
        return problems
