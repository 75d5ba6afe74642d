"""Starts by `srun` without torchrun: Slurm's variables say who this process is, and are translated to torchrun's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mae_et.errors import UserError

_FIRST_PORT, _NUM_PORTS = 15000, 15000  # outside the range from which Linux takes ports for outgoing connections


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's variables for a process that `srun` started as one of several; {} for any other process.

    MASTER_ADDR and MASTER_PORT are kept where they are set. Otherwise the address is the first node of the step, and the
    port follows from the numbers of the job and the step.

    Args:
        environment: of this process. If torchrun's WORLD_SIZE or RANK is set, torchrun started it.
    Raises:
        UserError: if variables of Slurm are missing or cannot be read.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or {"WORLD_SIZE", "RANK"} & environment.keys():
        return {}
    try:
        step = environment["SLURM_STEP_ID"]
        node = int(environment["SLURM_NODEID"])
        port = _FIRST_PORT + (int(environment["SLURM_JOB_ID"]) + 7919 * int(step)) % _NUM_PORTS
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"this process is one of {environment['SLURM_STEP_NUM_TASKS']} tasks of a Slurm step, but variables of the step are "
            f"missing or cannot be read ({error}), so the processes cannot find each other. Start it with srun, or start one "
            "task on each node with torchrun in it"
        ) from error


def first_host(nodes: str) -> str:
    """Returns the first host of a node list of Slurm: "gpu[03-05,09],cpu1" -> "gpu03".

    Raises:
        ValueError: if there is none.
    """
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if found is None:
        raise ValueError(f"no host in {nodes!r}")
    return "".join(part or "" for part in found.groups())


def tasks_per_node(counts: str) -> list[int]:
    """Expands Slurm's list of tasks on each node: "4(x2),3" -> [4, 4, 3].

    Raises:
        ValueError: if it cannot be read.
    """
    expanded: list[int] = []
    for entry in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if found is None:
            raise ValueError(f"no number of tasks in {entry!r}")
        expanded += [int(found[1])] * int(found[2] or 1)
    return expanded
