"""`--push-to-hub`: an exported folder to a private repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UserError


def refuse_stranger(repository: str) -> None:
    """Raises UserError when nobody is logged in, before hours of work end in a refusal."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the hub's client raises a dozen kinds; each means: not now
        raise UserError(
            f"--push-to-hub {repository}: the hub does not know who asks ({_first_line(error)}); "
            "log in with `hf auth login`, or leave the option out"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload `folder`; the address. A new repository is private. Raises UserError; the folder
    stays."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # as above
        raise UserError(
            f"--push-to-hub {repository}: {_first_line(error)}. The export in {folder} is whole; "
            f"push it with `hf upload {repository} {folder}`"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
