"""The number of processes that a launcher such as torchrun started, each with a copy of the same command."""

from __future__ import annotations

from collections.abc import Mapping

from qformat.errors import UsageError

LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers pass the number of processes, as torch and accelerate read them.

torchrun and `accelerate launch` set the first, MPI's launchers and Slurm's with PMI the others. Slurm's own variables
are not read: they also count tasks that the batch script has not started.
"""


def check_single_process(what: str, environment: Mapping[str, str]) -> None:
    """Check that no launcher started several processes, which would all write the same files.

    Args:
        what: What runs in one process, for the message.
        environment: Environment variables of this process.

    Raises:
        UsageError: A launcher started several processes.
    """
    for name in LAUNCHED:
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UsageError(
                f"{what} runs in one process, but {count} were started ({name}={count}). Start it without torchrun, "
                f"accelerate launch or another launcher of several processes, or with one process. If no launcher "
                f"runs, unset {name}"
            )
