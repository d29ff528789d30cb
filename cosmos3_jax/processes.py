"""Several processes that run one program: how they find each other, who speaks for all, and how they end together.

The same command is started once for each process; JAX then shows every one of them the devices of all. A process that dies
stops sending heartbeats, and JAX ends the others, with a message and a non-zero code.
"""

import hashlib
import os
import re
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmos3_jax.errors import InputError

HEARTBEAT_SECONDS = 30  # silence after which a process counts as dead
START_SECONDS = 120  # what JAX is told to wait for processes that are not there yet; it takes about twice as long
FAREWELL_SECONDS = 2  # what the others have to say something of their own before the end of process 0 ends them


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several. Call it before any device is touched; alone, it does nothing.

    `coordinator` is "HOST:PORT", an address of process 0 that all can reach. With no arguments JAX asks SLURM, Open MPI
    or Kubernetes, if one of them started this process as one of several; `num_processes=1` alone says that it is not. A process
    with arguments takes every GPU that it sees. Raises InputError for values that cannot be meant.
    """
    if coordinator is None and process_id is None and num_processes in (None, 1):
        if num_processes is None and _launched_as_one_of_several():
            # [] is all GPUs; without, JAX gives each process the one of its number on the host
            _initialize(**({"local_device_ids": []} if _alone_on_its_host() else {}))
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator HOST:PORT, --num-processes N and --process-id I belong together; give all three")
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InputError(f"coordinator={coordinator!r}: HOST:PORT of process 0 is expected, for example 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
        raise InputError(f"process_id={process_id}, num_processes={num_processes}: processes are numbered from 0 to N - 1")
    _check_address(coordinator, host.strip("[]"), int(port), listens=process_id == 0)
    print(f"process {process_id} of {num_processes}: waiting for the others at {coordinator}", file=sys.stderr, flush=True)
    _initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",  # else a SLURM job around it would leave this process one GPU
    )


def _check_address(coordinator: str, host: str, port: int, *, listens: bool) -> None:
    """Raises InputError for a host without an address and for a port in use; XLA (as of jax 0.12) would wait, then crash."""
    what = "there is no such host"
    try:
        socket.getaddrinfo(host, port)
        if listens:
            what = "process 0 cannot listen on this port"
            socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(f"coordinator={coordinator!r}: {what} ({error.strerror})") from error


def _initialize(**settings: Any) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    settings |= {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "initialization_timeout": START_SECONDS}
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes could not find each other: {error}") from error
    jax.devices()  # they tell each other their devices now: after a long download some would have stopped waiting


def _launched_as_one_of_several() -> bool:
    """Whether SLURM (srun), Open MPI (mpirun) or an indexed job of Kubernetes started this process beside others."""
    seen = os.environ.get
    tasks = seen("SLURM_STEP_NUM_TASKS") or seen("SLURM_NTASKS", "1")
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(tasks) > 1
    open_mpi = int(seen("OMPI_COMM_WORLD_SIZE", "1")) > 1
    return slurm or open_mpi or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()


def _alone_on_its_host() -> bool:
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):  # first, as JAX asks: mpirun may run inside a SLURM job
        return size == "1"
    return re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_TASKS_PER_NODE", "")) is not None  # not "1(x2),2"


def are_several() -> bool:
    """Whether other processes run beside this one."""
    return jax.distributed.is_initialized()


def agree(what: object) -> None:
    """Raises InputError unless all processes give the same, by its repr: unlike programs would wait for each other for ever."""
    if are_several():
        try:
            multihost_utils.assert_equal(np.frombuffer(hashlib.sha256(repr(what).encode()).digest(), np.uint8))
        except AssertionError as error:
            raise InputError("the processes were asked for different things; give all the same flags and files") from error


def wait() -> None:
    """Until all processes are here: one that ends while another works would, after some minutes, end that one too."""
    if are_several():
        multihost_utils.sync_global_devices("all are here")


def told(value: int) -> int:
    """What the first process gives."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if are_several() else value


def is_first() -> bool:
    """Whether this process speaks and writes for all; alone, it does."""
    return not are_several() or jax.process_index() == 0


def leave(code: int) -> None:
    """Ends this process at once, after an error, if others run beside it; alone, it does nothing.

    Python's own exit would wait at a barrier for the others, while they wait in a collective for this one.
    """
    if are_several():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():  # what it was told the others may be told as well, and are to say it before they lose the coordinator
            time.sleep(FAREWELL_SECONDS)
        os._exit(code)
