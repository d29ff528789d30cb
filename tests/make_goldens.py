"""Records what the reference computes: `python tests/make_goldens.py` writes tests/data/goldens/*.npz.

Needs the extra `parity`. The tests compare with these numbers, and where torch is installed with the reference itself.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import cases
import numpy as np
import reference
from metrics import errors, sample

from convert.random_checkpoint import write_checkpoint

GOLDENS = Path(__file__).parent / "data" / "goldens"


class Live:
    """`live(name)[key]` computes what `np.load(f"{name}.npz")[key]` holds, on the checkpoints of `folders(family)`."""

    def __init__(self, folders: Callable[[str], Path]):
        self.folders = folders

    def __call__(self, name: str) -> "Family | dict[str, np.ndarray]":
        if name == "vae":
            return reference.blocks(_load(self.folders("small")))
        if name == "media":
            return reference.fitted(cases.IMAGE, cases.CLIP[:1], cases.SIZES)
        if name == "sound":
            return reference.sounds(_load(self.folders("small")))
        if name == "sound_encoder":
            return reference.heard(self.folders("full_sound"))
        return Family(self.folders(name))


@dataclasses.dataclass(frozen=True)
class Family:
    """What the reference makes of one family's checkpoint: "layer.und", "text_to_video.latents", …

    Of a bf16 run, only how far it is from float32 ("text_to_video.latents.bf16").
    """

    folder: Path

    def __getitem__(self, key: str) -> np.ndarray:
        case, output, *bf16 = key.split(".")
        if case == "layer":
            return reference.layer(_load(self.folder))[output]
        exact = _run(self.folder, "float32", case)[output]
        if bf16:
            return errors(_run(self.folder, "bfloat16", case)[output], exact)
        return sample(exact) if output in ("video", "sound") else exact


def keys() -> list[str]:
    """All that a family's file holds."""
    outputs = [f"{case}.{output}" for case in cases.CASES for output in cases.outputs_of(case)]
    bf16 = [f"{case}.{output}.bf16" for case in cases.BF16_CASES for output in cases.outputs_of(case)]
    return [f"layer.{output}" for output in ("und", "gen", "cos", "sin")] + outputs + bf16


@functools.cache
def _load(folder: Path, dtype: str = "float32"):
    return (reference.load_distilled if _is_distilled(folder) else reference.load)(folder, dtype)


def _is_distilled(folder: Path) -> bool:
    return (folder / "modular_model_index.json").is_file()


@functools.cache
def _run(folder: Path, dtype: str, case: str) -> dict[str, np.ndarray]:
    if _is_distilled(folder):
        return reference.run_distilled(_load(folder, dtype), cases.DISTILLED_CASES[case])
    return reference.run(_load(folder, dtype), cases.CASES[case])


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:

        def folder(family: str) -> Path:
            return Path(scratch) / family

        for family, config in cases.FAMILIES.items():
            write_checkpoint(folder(family), config, cases.VAE)
        live = Live(folder)
        files = {family: {key: live(family)[key] for key in keys()} for family in cases.FAMILIES}
        write_checkpoint(folder("distilled"), cases.DISTILLED, cases.VAE, distilled=True)
        write_checkpoint(folder("full_sound"), cases.FAMILIES["small"], cases.VAE, cases.FULL_SOUND)
        distilled = [f"{case}.{output}" for case in cases.DISTILLED_CASES for output in ("latents", "video")]
        files |= {"distilled": {key: live("distilled")[key] for key in distilled}}
        files |= {name: live(name) for name in ("vae", "media", "sound", "sound_encoder")}
    for name, arrays in files.items():
        np.savez_compressed(GOLDENS / f"{name}.npz", versions=np.array(json.dumps(reference.VERSIONS)), **arrays)


if __name__ == "__main__":
    main()
