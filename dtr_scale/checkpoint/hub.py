"""Publish a folder on the Hugging Face hub; alone in importing its library."""

from pathlib import Path

from dtr_scale.errors import CheckpointError, ConfigError


def check_hub_name(name: str) -> None:
    """Raise ConfigError for what can be no name of the hub, or where its library is missing."""
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--push needs {error.name}, which is missing; fix: pip install dtr-scale[prepare]"
        ) from error
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"--push={name} is no name of the hub; give ORGANISATION/NAME, as in me/dit-l-dtr"
        ) from None


def push_folder(folder: Path, name: str) -> str | None:
    """Upload a folder as the model `name`, and return where; None where there is no token.

    A model that is not there yet is made, private. Raises CheckpointError where the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        return None
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder).commit_url)
    except Exception as error:  # the library and its transport fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder} is written, but the hub did not take it as {name} ({reason}); push it "
            f"later: hf upload {name} {folder}"
        ) from error
