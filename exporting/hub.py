"""`export.py --push_to_hub`: a finished export becomes a model repository on the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from utils.files import UserError, read_json, short


def find_hub_faults(name: str) -> list[str]:
    """What makes a push impossible and shows without the network: one line, or none. Imports no torch."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [f"push_to_hub is {name!r}; write USER/NAME or NAME: {short(error)}"]
    if constants.is_offline_mode():
        return ["push_to_hub needs the network; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"]
    if get_token() is None:
        return ["push_to_hub needs a token that may write; run `hf auth login`, or set HF_TOKEN"]
    return []


def find_changes(folder: Path, facts: dict[str, Any]) -> list[str]:
    """One line if the existing `folder` is not the export that would be written now, which has these `facts`."""
    path = folder / "export_report.json"
    found = read_json(path) if path.is_file() else {}
    changed = [name for name, value in facts.items() if name not in found or found[name] != value]
    remedy = "remove it, or choose another --output"
    return [f"{folder} exists and is not this export, by its {', '.join(changed)}; {remedy}"] if changed else []


def push(folder: Path, name: str, private: bool) -> None:
    """Upload `folder` to the repository `name` (USER/NAME, or NAME of the token's user), which is created if needed.

    Files that the Hub already has are not sent again, also after an interrupted push. `UserError` if it fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repository).private)  # one that existed keeps its visibility
        if is_private or not private:
            # Weights of an earlier export with other shards would be loaded in place of these.
            stale = ["model*.safetensors*"] if any(folder.glob("model*.safetensors")) else None
            message = "Upload an export of Plainloop"
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=stale)
    except Exception as error:  # each of httpx, hf_xet and huggingface_hub has errors of its own
        # huggingface_hub says in a RuntimeError which file it was, and in its cause why.
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = short(error) + (f" {short(cause)}" if isinstance(cause, Exception) else "")
        raise UserError(
            f"cannot push to {name}: {reason}; {folder} is complete: the same command pushes what is missing"
        ) from error
    if private and not is_private:
        raise UserError(f"{repository} is public, so nothing was pushed; add --private false, or choose another name")
    print(f"pushed {folder} to {api.endpoint}/{repository} ({'private' if is_private else 'public'})")
