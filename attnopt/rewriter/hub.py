"""Fetching a model from the Hugging Face hub, or saying clearly why that is not possible."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from attnopt.errors import SourceError

#: Everything but pickled weights.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def fetch_snapshot(repository: str) -> Path:
    """The local directory of a hub repository; a cached copy is used as it is, otherwise it is downloaded.

    Raises:
        SourceError: if the id is malformed, the repository does not exist or the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS, local_files_only=True))
    except HFValidationError as error:
        raise SourceError(f"{repository} is neither a file, a directory nor a hub id", str(error)) from error
    except OSError:
        pass  # not in the cache: the next step fetches it
    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated on the hub", "accept its licence there and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"there is no {repository} here nor on the hub", "check the spelling, or give a directory or .gguf file"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise SourceError(
            f"{repository} is no local path, and the hub cannot be reached ({type(error).__name__})",
            "download the model where there is a network and give its directory",
        ) from error
