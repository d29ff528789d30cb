"""What to do where a device's memory ends: what the request needs by the dry run, and which meshes or settings would fit.

A child process finds out: `estimate` needs eight virtual devices, and JAX has started here with the real ones. The child sees
no GPU and runs nothing of the caller's script. It prints each part of the answer when it has it: if time ends, those remain.
"""

import dataclasses
import functools
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from cosmos3_jax.errors import StoppedError
from cosmos3_jax.estimate import Estimate, Job, estimate, virtual_devices
from cosmos3_jax.networks import device_memory

log = logging.getLogger(__name__)

SECONDS = 120  # for the child; an estimate of Nano takes 2 to 6 on two cores, and at most 15 are made
DEVICES = 8  # of the largest mesh that is named
SIDES = (720, 480, 256)  # the shorter side of the published picture sizes
PROBES = 4  # between the least number of frames and the one asked for: within 1/16 of the largest that fits
LESS = 0.75  # of what should have fit but did not
# Of the child. A cached program would not tell its memory, and the caller's XLA_FLAGS may count devices.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""}
DRY_RUN = "`python -m cosmos3_jax.generate --dry-run`"


def remedy(job: Job, cfg: int, tp: int, memory: int, devices: int, text_tower: str, *, shared: bool = False) -> str:
    """A sentence for a job that ran out of `memory` bytes on each of cfg x tp devices, of `devices` that there are.

    `text_tower` is what becomes of it: "keep", "host" or "drop". Where the devices are `shared` out of one memory, as those of
    a CPU are, no other mesh is looked for. It takes about a minute, at most `SECONDS`; the sentence is shorter where the child
    fails or time ends. Raises nothing but StoppedError, of the second signal (stop.py).
    """
    parts, complete = _child(job, cfg, tp, memory, devices, text_tower, shared)
    if not parts:
        return f"{DRY_RUN} with the flags of this request tells what it needs, and which meshes have it"
    return "; ".join(parts if complete else [*parts, f"{DRY_RUN} tells more"])


def memory_of(mesh: Mesh) -> int:
    """Bytes for each device of a mesh in this process: what JAX may take of a GPU, or a CPU device's share of the host."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device_memory(mesh) or host // len(mesh.local_devices)


def _child(job: Job, *others: Any) -> tuple[list[str], bool]:
    """What `findings` gives in a process of its own, and whether that is all of it. The process ends with this call."""
    there = [None if given is None else True for given in (job.request.image, job.request.video)]  # `estimate` asks no more
    request = dataclasses.replace(job.request, image=there[0], video=there[1], latents=None, sound_latents=None)
    program = f"import sys; sys.path[:] = {list(map(str, sys.path))}; from cosmos3_jax.remedy import answer; answer()"
    try:
        asked = pickle.dumps((dataclasses.replace(job, request=request), *others))
        command, environment = [sys.executable, "-c", program], os.environ | ENVIRONMENT
        done = subprocess.run(command, input=asked, capture_output=True, check=True, timeout=SECONDS, env=environment)
        return done.stdout.decode(errors="replace").splitlines(), True
    except StoppedError:
        raise
    except Exception as error:  # whatever it is, the caller has a worse one to tell
        told = getattr(error, "stdout", None) or b""
        log.debug("no whole dry run: %r %s", error, getattr(error, "stderr", None))
        return told.decode(errors="replace").splitlines(), False


def answer() -> None:
    """The child: takes from stdin what `findings` is asked, and prints its parts, a line each."""
    signal.alarm(SECONDS)  # it ends even if its parent was killed
    asked = pickle.load(sys.stdin.buffer)
    virtual_devices(max(DEVICES, asked[1] * asked[2]))
    for part in findings(*asked):
        print(part, flush=True)


def findings(job: Job, cfg: int, tp: int, memory: int, devices: int, text_tower: str, shared: bool) -> Iterator[str]:
    """The parts of the sentence: what is needed, what fits without asking for less, and else what is less and fits here."""
    here, keep = estimate(job, cfg, tp), text_tower == "keep"
    peak, dropped = here.highest(keep=keep), here.highest(keep=False)
    also = f" (about {_gb(dropped)} with --text-tower drop)" if keep else ""
    needed = (
        f"the dry run puts the peak of this request at about {_gb(peak)}{also} on each device, where there are {_gb(memory)}"
    )
    limit, would = memory, "would fit"
    if peak <= memory:
        limit, would = int(LESS * peak), "would need a quarter less"
        needed += ": it should fit, but something else may be in that memory, or the device's own programs need more"
    yield needed

    def tower(e: Estimate) -> str | None:
        """What fits says of the text tower; None where nothing fits. On another mesh it would be kept, unless told."""
        is_kept = keep or (e.cfg, e.tp) != (cfg, tp)
        flag = f" --text-tower {'drop' if keep else text_tower}" if is_kept else ""
        return "" if e.highest(keep=is_kept) <= limit else flag if e.highest(keep=False) <= limit else None

    ways = ["--text-tower drop"] if dropped <= limit else []
    ways += [] if shared else _meshes(job, here, devices, tower, beyond=not ways)
    if ways:
        yield f"it {would} with {' or with '.join(ways)}"
    elif not shared:
        yield f"it {would} on no mesh of up to {DEVICES} devices"
    if dropped > limit:
        yield f"on this mesh {_less(job, here, tower)} {would}"


def _meshes(job: Job, here: Estimate, devices: int, tower: Callable[[Estimate], str | None], *, beyond: bool) -> list[str]:
    """The flags of at most two meshes, the smallest first; or else, if `beyond`, of one of more devices than there are."""
    branches = (1, 2) if job.request.guided else (1,)  # without guidance, half of cfg=2 has nothing to do
    meshes = [(cfg, tp) for cfg in branches for tp in job.transformer.tensor_parallel_sizes()]
    ways: list[str] = []
    for used, tp, cfg in sorted((cfg * tp, tp, cfg) for cfg, tp in meshes):
        missing = used > devices
        if len(ways) == 2 or used > DEVICES or (missing and (ways or not beyond)):
            break
        is_other = used >= here.cfg * here.tp and (cfg, tp) != (here.cfg, here.tp)
        if is_other and (flag := tower(estimate(job, cfg, tp))) is not None:
            ways.append(f"--cfg {cfg} --tp {tp}{flag}" + f" ({used} devices, not {devices})" * missing)
    return ways


def _less(job: Job, here: Estimate, tower: Callable[[Estimate], str | None]) -> str:
    """Fewer frames or a smaller picture that fit; if neither does, the least of both, or that not even this does."""
    request, time = job.request, job.vae.scale_factor_temporal
    frames, picture = request.num_frames, (request.height, request.width)
    scales = [side / min(picture) for side in SIDES if side < min(picture)]
    pictures = [tuple(round(size * scale / 16) * 16 for size in picture) for scale in scales]
    high = (frames - 1) // time + 1  # latent frames; one alone would be an image
    low = min(high, 2 if request.video is None else max(request.condition_frame_indexes_vision) + 1)
    least = 1 + (low - 1) * time, [picture, *pictures][-1]

    @functools.cache
    def told(frames: int, picture: tuple[int, ...]) -> str:
        """In words, if it fits."""
        smaller = dataclasses.replace(request, num_frames=frames, height=picture[0], width=picture[1])
        flag = tower(estimate(dataclasses.replace(job, request=smaller), here.cfg, here.tp))
        return "" if flag is None else _size(frames, picture) + f" with{flag}" * bool(flag)

    if least == (frames, picture):
        return "nothing smaller"
    if not told(*least):
        return f"not even {_size(*least)}"
    longest = ""
    for _ in range(PROBES):
        middle = (low + high) // 2
        if low < high and (found := told(1 + (middle - 1) * time, picture)):
            longest, low = found, middle + 1
        else:
            high = middle
    largest = next(filter(None, (told(frames, each) for each in pictures)), "")
    return " or ".join(filter(None, (longest, largest))) or told(*least)


def _size(frames: int, picture: tuple[int, ...]) -> str:
    return f"{frames} frame{'s' * (frames > 1)} of {picture[0]}x{picture[1]}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
