"""All that a result depends on, as JSON has it: it is written into the file, and tells whether a file is what is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from cosmos3_jax.checkpoint import Checkpoint
from cosmos3_jax.request import ResolvedRequest, in_json
from cosmos3_jax.version import VERSION

# What moves a result by roundings, if at all, and the checker.
CIRCUMSTANCES = ("version", "jax", "cfg", "tp", "guardrails", "computed_steps")


def provenance(
    request: ResolvedRequest,
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: str,
    *,
    quantize: str | None,
    guardrails: str | None,
    lora: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Versions, the checkpoint, its revision or weights, adapters, the mesh, how it is computed, and the request's settings.

    Raises InputError for weights that cannot be read.
    """
    made_by = {"version": VERSION, "jax": jax.__version__, "checkpoint": checkpoint.name, "revision": checkpoint.revision}
    if checkpoint.revision is None:
        made_by["weights"] = checkpoint.identity("transformer", "vae", *["sound_tokenizer"] * bool(request.enable_sound))
    how = {"lora": list(lora) or None, **mesh.shape, "dtype": dtype, "quantize": quantize, "guardrails": guardrails}
    given = {name: value for name, value in (made_by | how).items() if value is not None}
    return given | in_json(request, checkpoint.scheduler)


def as_good(there: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a result is the one that is asked for, but for roundings, and checked if that would be."""
    is_checked = asked.get("guardrails") in (None, there.get("guardrails"))
    return is_checked and _essence(there) == _essence(asked)


def _essence(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in CIRCUMSTANCES}
