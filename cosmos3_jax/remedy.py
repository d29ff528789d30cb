"""What to do where a device's memory ends: what the request needs by the dry run, and which meshes or settings would fit.

It is asked of a child process: `estimate` needs eight virtual devices, and JAX has started here with the real ones. The child
sees no GPU and does not run the caller's script again. It prints each part of the answer as soon as it has it, so that where
time ends, the parts there are remain.
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

from cosmos3_jax.estimate import Estimate, Job, estimate, virtual_devices
from cosmos3_jax.networks import device_memory
from cosmos3_jax.request import ResolvedRequest

log = logging.getLogger(__name__)

SECONDS = 120  # for the child; an estimate of Nano takes 2 to 6 on two cores, and at most 15 are made
DEVICES = 8  # of the largest mesh that is named
SIDES = (720, 480, 256)  # the shorter side of the pictures that the models were trained on
PROBES = 4  # of a number of frames between the least and what was asked: within 1/16 of the largest that fits
LESS = 0.75  # of what should have fit but did not
# Of the child. A cached program would not tell its memory, and the caller's XLA_FLAGS may count devices.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""}
DRY_RUN = "`python -m cosmos3_jax.generate --dry-run`"

Flag = Callable[[Estimate], str | None]
"""What an estimate needs to fit: nothing (""), a flag for the text tower, or more than there is (None)."""


def remedy(job: Job, cfg: int, tp: int, memory: int, devices: int, text_tower: str, *, shared: bool = False) -> str:
    """A sentence for a job that had too little with `memory` bytes on each of cfg x tp devices, of `devices` that there are.

    `text_tower` is what became of it: "keep", "host" or "drop". Where devices share their memory, as those of a CPU do, no
    other mesh is looked for. It takes up to a minute, at most `SECONDS`; where the child fails or time ends, the sentence is
    shorter. Raises nothing of its own.
    """
    parts, complete = _child(_small(job), cfg, tp, memory, devices, text_tower, shared)
    if not parts:
        return f"{DRY_RUN} with the flags of this request tells what it needs, and which meshes have it"
    return "; ".join(parts if complete else [*parts, f"{DRY_RUN} tells more"])


def memory_of(mesh: Mesh) -> int:
    """Bytes that each device of this process has: what JAX may take of a GPU, a CPU device's share of the host."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device_memory(mesh) or host // len(mesh.local_devices)


def _small(job: Job) -> Job:
    """The same for `estimate`, which asks of a picture, a clip and latents only whether they are there."""
    given = {name: None if getattr(job.request, name) is None else True for name in ("image", "video")}
    return dataclasses.replace(
        job, request=dataclasses.replace(job.request, prompt="", negative_prompt="", latents=None, sound_latents=None, **given)
    )


def _child(*asked: Any) -> tuple[list[str], bool]:
    """What `findings` gives in a child process, and whether that is all of it. The child ends with this call."""
    program = f"import sys; sys.path[:] = {list(map(str, sys.path))}; from cosmos3_jax.remedy import answer; answer()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps(asked),
            capture_output=True,
            env=os.environ | ENVIRONMENT,
            timeout=SECONDS,
        )
        told, why = done.stdout, done.stderr.decode(errors="replace")[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        told, why = error.stdout or b"", f"it took longer than {SECONDS} s"
    except Exception as error:  # whatever it is, the caller has a worse one to tell
        told, why = b"", repr(error)
    if why:
        log.debug("no whole dry run: %s", why)
    return told.decode(errors="replace").splitlines(), not why


def answer() -> None:
    """The child: takes from stdin what `findings` is asked, and prints its parts, a line each."""
    signal.alarm(SECONDS)  # it ends even if the parent was killed
    asked = pickle.load(sys.stdin.buffer)
    _, cfg, tp, *_ = asked
    virtual_devices(max(DEVICES, cfg * tp))
    for part in findings(*asked):
        print(part, flush=True)


def findings(job: Job, cfg: int, tp: int, memory: int, devices: int, text_tower: str, shared: bool = False) -> Iterator[str]:
    """The parts of the sentence: what is needed, what fits as it is, and on this mesh, where nothing else does, what is less."""
    here = estimate(job, cfg, tp)
    peak, without = here.highest(keep=text_tower == "keep"), here.highest(keep=False)
    also = f" (about {_gb(without)} with --text-tower drop)" if text_tower == "keep" else ""
    needed = (
        f"the dry run puts the peak of this request at about {_gb(peak)}{also} on each device, where there are {_gb(memory)}"
    )
    limit, would = memory, "would fit"
    if peak <= memory:
        limit, would = int(LESS * peak), "would need a quarter less"
        needed += ": it should fit, but something else may be in that memory, or the device's own programs need more"
    yield needed

    def flag(e: Estimate) -> str | None:
        if e.highest(keep=text_tower == "keep" or (e.cfg, e.tp) != (cfg, tp)) <= limit:
            return ""
        drop = "drop" if text_tower == "keep" else text_tower
        return f" --text-tower {drop}" if e.highest(keep=False) <= limit else None

    dropped = flag(here)
    ways = [dropped.strip()] if dropped else []
    if not shared:
        ways += _meshes(job, here, devices, flag, any_number=not ways)
        if not ways:
            yield f"it {would} on no mesh of up to {DEVICES} devices"
    if ways:
        yield f"it {would} with {' or with '.join(ways)}"
    if not dropped:
        yield f"on this mesh {_smaller(job, here, flag)} {would}"


def _meshes(job: Job, here: Estimate, devices: int, flag: Flag, *, any_number: bool) -> list[str]:
    """The flags of at most two meshes, the smallest first; of more devices than there are only if there is no other way."""
    used = here.cfg * here.tp
    sizes, branches = job.transformer.tensor_parallel_sizes(), (1, 2) if job.request.guided else (1,)
    meshes = [(cfg, tp) for cfg in branches for tp in sizes if used <= cfg * tp <= DEVICES and (cfg, tp) != (here.cfg, here.tp)]
    ways: list[str] = []
    for cfg, tp in sorted(meshes, key=lambda mesh: (mesh[0] * mesh[1], mesh[1])):
        too_many = cfg * tp > devices
        if len(ways) == 2 or (too_many and (ways or not any_number)):
            break
        if (tower := flag(estimate(job, cfg, tp))) is not None:
            ways.append(f"--cfg {cfg} --tp {tp}{tower}" + f" ({cfg * tp} devices, not {devices})" * too_many)
    return ways


def _smaller(job: Job, here: Estimate, flag: Flag) -> str:
    """Fewer frames or a smaller picture that fit; if neither does, the least of both, or that not even this does."""
    request, time = job.request, job.vae.scale_factor_temporal
    asked = request.num_frames, request.height, request.width
    pictures = [_picture(request, side) for side in SIDES if side < min(asked[1:])]
    high = (request.num_frames - 1) // time + 1  # latent frames
    low = min(high, 2 if request.video is None else max(request.condition_frame_indexes_vision) + 1)  # one would be an image
    least = 1 + (low - 1) * time, *(pictures[-1] if pictures else asked[1:])

    @functools.cache
    def told(num_frames: int, height: int, width: int) -> str:
        less = dataclasses.replace(request, num_frames=num_frames, height=height, width=width)
        tower = flag(estimate(dataclasses.replace(job, request=less), here.cfg, here.tp))
        return "" if tower is None else _frames(num_frames, height, width) + f" with{tower}" * bool(tower)

    if least == asked:
        return "nothing smaller"
    if not told(*least):
        return f"not even {_frames(*least)}"
    longest = ""
    for _ in range(PROBES):
        middle = (low + high) // 2
        if low < high and (found := told(1 + (middle - 1) * time, *asked[1:])):
            longest, low = found, middle + 1
        else:
            high = middle
    largest = next(filter(None, (told(request.num_frames, *picture) for picture in pictures)), "")
    return " or ".join(filter(None, (longest, largest))) or told(*least)


def _picture(request: ResolvedRequest, side: int) -> tuple[int, int]:
    """(height, width) of the same shape with `side` for the shorter one, in multiples of 16."""
    shorter = min(request.height, request.width)
    return round(request.height * side / shorter / 16) * 16, round(request.width * side / shorter / 16) * 16


def _frames(num_frames: int, height: int, width: int) -> str:
    return f"{num_frames} frame{'s' * (num_frames > 1)} of {height}x{width}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
