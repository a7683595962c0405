"""From a model's name to a local folder: the bundled models, a folder, or a download from a model hub.

The hub client reads HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE itself. Only files that are data are
fetched: safetensors, JSON, templates and tokenizers; never code, never pickles.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from jinfer.config import BUNDLED_MODEL
from jinfer.errors import ModelError
from jinfer.weights.files import read_json_object, some
from jinfer.weights.safetensors_source import INDEX_FILE

BUNDLED = (BUNDLED_MODEL, f"{BUNDLED_MODEL}-draft")

SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
WEIGHT_FILES = ["*.safetensors"]
# Other forms of the same model, in folders of their own or under the names of its first release.
# JSON passes in folders such as 1_Pooling: how sentence-transformers models become embeddings is told there.
LEFT_OUT = [
    *("[!0-9]*/*.json", "[0-9][!_]*/*.json", "[0-9]_*/*/*.json"),
    *("*/*.model", "*/*.txt", "*/*.safetensors", "consolidated*.safetensors"),
]


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: a bundled one by name, a local folder, else a hub id, downloaded or from the
    cache.

    `revision` is a branch, tag or commit of a hub id. With `weights=False` only config and tokenizer are
    fetched.

    Raises:
      ModelError: there is no such folder or hub model, access to it is refused, the hub cannot be
        reached and the cache has no complete copy, or what was found is no model.
    """
    if model in BUNDLED:
        return _bundled(model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path.resolve()
    if model and path.exists():
        raise ModelError(f"model {model!r} is a file, expected a folder with config.json and safetensors")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", model):
        raise ModelError(
            f"model {model[:200]!r} is not an existing folder: give a folder, a hub id such as owner/name, "
            f"or one of the bundled models: {', '.join(BUNDLED)}"
        )
    folder = _download(model, revision, SMALL_FILES + (WEIGHT_FILES if weights else []))
    if weights:
        _check_complete(model, folder)
    return folder


def _check_complete(model: str, folder: Path) -> None:
    """Raises ModelError where a file of the model is missing from what was downloaded, or from the hub's copy."""
    from huggingface_hub import constants

    config, index = folder / "config.json", folder / INDEX_FILE
    lacking = [] if config.is_file() or (folder / "adapter_config.json").is_file() else [config.name]
    if index.is_file():
        listed = read_json_object(index).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
        lacking += [name for name in names if not (folder / name).is_file()]
    elif not any(path.is_file() for path in folder.glob("*.safetensors")):
        lacking.append("the safetensors files")
    if not lacking:
        return
    if constants.HF_HUB_OFFLINE or (index.is_file() and config.is_file()):
        raise ModelError(
            f"the download of the hub model {model!r} in the local cache ({folder}) is not complete, it lacks "
            f"{some(lacking)}: download the rest without HF_HUB_OFFLINE and with a network, or give a local folder"
        )
    if lacking[0] == config.name:
        raise ModelError(
            f"the hub model {model!r} has no config.json: expected a model in transformers' layout"
        )
    raise ModelError(
        f"the hub model {model!r} has no safetensors, and jinfer never unpickles a file: choose a revision or a copy "
        f"that has them (where the hub could not be reached, the copy in {folder} is not complete)"
    )


def _bundled(name: str) -> Path:
    folder = Path(str(resources.files("jinfer"))) / "assets" / name
    if not (folder / "config.json").is_file():
        raise ModelError(f"the bundled model {name!r} is missing from {folder.parent}: install jinfer again")
    return folder


def _download(model: str, revision: str | None, allowed: list[str]) -> Path:
    # Imported here: a local folder needs no hub client, and the client reads its environment when imported.
    from huggingface_hub import constants, errors, snapshot_download

    hub = constants.ENDPOINT
    at = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=allowed, ignore_patterns=LEFT_OUT)
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub model {at} is gated: accept its terms at {hub}/{model} and set HF_TOKEN to a token "
            "of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {model!r}, and {hub} shows no model of that name: check the spelling; "
            "if it is private, set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub model {model!r} has no revision {revision!r}: check the name") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(_not_cached(at, hub, constants.HF_HUB_OFFLINE)) from error
    except errors.HFValidationError as error:
        raise ModelError(f"model {model!r} is neither a folder nor a valid hub id: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "check that HF_TOKEN is valid and may read it" if status in (401, 403) else "try again later"
        raise ModelError(f"{hub} answered {status} when asked for {at}: {hint}") from error
    except Exception as error:  # transport, proxy and disk have no error in common
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"the download of {at} from {hub} failed: {reason[:500]}") from error


def _not_cached(at: str, hub: str, offline: bool) -> str:
    if offline:
        return (
            f"the hub model {at} is not complete in the local cache and HF_HUB_OFFLINE is set: "
            "download it once without HF_HUB_OFFLINE, or give a local folder"
        )
    return (
        f"{hub} cannot be reached and the hub model {at} is not complete in the local cache: "
        "check the network and HF_ENDPOINT, or give a local folder"
    )
