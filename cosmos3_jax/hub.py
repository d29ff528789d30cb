"""Hugging Face repositories: the only file that imports huggingface_hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from cosmos3_jax.errors import InputError, first_line

PLAIN = ("*.json", "*.jinja", "*.txt")  # configs, tokenizer, chat template
ROOT = ("model_index.json", "modular_model_index.json", "LICENSE*", "assets/*.json")


def download(repository: str, parts: Sequence[str], *, weights: bool = True) -> Path:
    """The folder to which these parts of a repository ("nvidia/Cosmos3-Nano", or "...@revision") were downloaded.

    Nothing else of it is fetched, and what the cache has is not fetched again. Raises InputError if it cannot be had.
    """
    name, at, revision = repository.partition("@")
    if at and not revision:
        raise InputError(f"{repository}: a revision is expected behind the @")
    kinds = (*PLAIN, "*.safetensors") if weights else PLAIN
    wanted = [*ROOT, *(f"{part}/{kind}" for part in parts for kind in kinds)]
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ValueError as error:  # an HF_ENDPOINT that is no address
        raise InputError(f"{repository}: huggingface_hub cannot be used ({error})") from error
    try:
        return Path(snapshot_download(name, revision=revision if at else None, allow_patterns=wanted))
    except HFValidationError as error:
        raise InputError(f"{repository}: neither a folder here nor the id of a Hugging Face repository") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repository}: Hugging Face shows no such repository; if its licence must be accepted first, do that on its page "
            "and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository}: this repository has no revision {revision!r}") from error
    except Exception as error:  # no network, a broken one, an incomplete cache: its HTTP library has many classes for them
        option = f"--revision {revision} " if at else ""
        raise InputError(
            f"{repository}: neither a folder here nor to be had from Hugging Face ({first_line(error)}); where there is a "
            f"network, run `hf download {name} {option}--local-dir DIR` (model_index.json, assets and {', '.join(parts)} are "
            "needed), put DIR on this machine, and give its path"
        ) from error


def repository(folder: Path) -> str | None:
    """The id of the repository whose snapshot in Hugging Face's cache this folder is; None for another folder."""
    kind, *name = folder.parent.parent.name.split("--")
    return "/".join(name) if folder.parent.name == "snapshots" and kind == "models" else None


def revision(folder: Path) -> str | None:
    """The commit that a folder was downloaded from: a snapshot of the cache, or the work of `hf download --local-dir`."""
    if repository(folder) is not None:
        return folder.name
    record = folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata"  # the commit is its first line
    try:
        commit = record.read_text(encoding="ascii").partition("\n")[0]
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None
