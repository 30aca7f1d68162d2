"""`--push-to-hub`: uploads an exported folder to a private repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UserError


def require_login(repository: str) -> None:
    """Raises UserError if nobody is logged in, before the export starts: it can take hours."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the hub's client raises many types; each means: not possible now
        raise UserError(
            f"--push-to-hub {repository}: not logged in to the hub ({_first_line(error)}); log in "
            "with `hf auth login`, or leave the option out"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload `folder` and return the address. A new repository is private.

    Raises UserError if the upload fails. The folder is kept.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # as above
        raise UserError(
            f"--push-to-hub {repository}: {_first_line(error)}. The export in {folder} is "
            f"complete; push it with `hf upload {repository} {folder}`"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
