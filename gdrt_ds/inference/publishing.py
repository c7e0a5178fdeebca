"""An adapter as others can use it: a folder with its card, catalogue and prompt, and its way to the hub.

`write_adapter` makes the folder, and `push_to_hub` uploads it with huggingface_hub. What stands in the way of
an upload (name, token, a network that is switched off) is looked at before anything is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import set_usual_mode, write_json
from gdrt_ds.inference.adapter_card import Adapter, adapter_card
from gdrt_ds.inference.catalogue_files import write_catalogue
from gdrt_ds.inference.output_folder import check_output, writing_to
from gdrt_ds.inference.public_names import public_path

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
REPAIR = "the file is damaged: copy the run again from where it was trained, or train again"


def write_adapter(
    run: str | Path, output: str | Path, base_name: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """Writes the adapter of a run as a folder of its own.

    Args:
        run: run folder of a finished training.
        output: new or empty folder.
        base_name: the base as others name it, e.g. `owner/name` on the hub; None = as the run names it, of a
            folder the last part.
        name: the adapter as others name it; None = the run's name.

    Returns:
        {"folder", "base", "catalogue"}: where it is, the base that it names, and what was written of the
        catalogue, in words.

    Raises:
        UserError: no adapter, or one that changes nothing, is damaged or not finite, or belongs to a base
            that the run made itself; an output that cannot be used.
    """
    run = Path(run)
    output = Path(output)
    config = _open(run)
    check_weights(run / "adapter" / "adapter_model.safetensors")
    _adapter_settings(run / "adapter" / "adapter_config.json")
    target = check_output(output)
    base = base_name or public_path(config.model.path, run, config)
    about = Adapter(run, config, base, name or run.resolve().name)
    with writing_to(target) as scratch:
        shutil.copytree(run / "adapter", scratch, ignore=shutil.ignore_patterns("README.md"))
        set_usual_mode(scratch / "adapter_model.safetensors")
        _name_base(scratch / "adapter_config.json", base, config.model.revision)
        catalogue = write_catalogue(run, scratch, config)
        (scratch / "README.md").write_text(adapter_card(about), encoding="utf-8")
    return {"folder": str(output), "base": base, "catalogue": catalogue}


def base_of(run: str | Path) -> str:
    """The base as the run names it; of a folder the last part.

    Raises:
        UserError: this is no run folder with an adapter that others can load.
    """
    config = _open(Path(run))
    return public_path(config.model.path, Path(run), config)


def _open(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run} is not a run folder (no config.yaml)", "give the run.dir of a finished run"
        )
    if not (run / "adapter" / "adapter_model.safetensors").is_file():
        raise UserError(
            f"--run {run} has no adapter/ yet", "let the run finish, or resume it with resume=auto"
        )
    config = load_config(run / "config.yaml")
    if config.model.new_tokens:
        raise UserError(
            f"--adapter-only: the run has model.new_tokens = {config.model.new_tokens}, so its adapter "
            f"belongs to {run / 'base'}, whose tokens no other base has",
            "export the merged model: leave --adapter-only out",
        )
    return config


def check_weights(file: Path) -> None:
    """Refuses an adapter whose lora_B are all zero, which changes nothing, or that is damaged or not finite.

    Raises:
        UserError: see above.
    """
    from safetensors import SafetensorError, safe_open

    changes = False
    try:
        with safe_open(str(file), "pt") as stored:
            for name in stored.keys():
                values = stored.get_tensor(name)
                if not bool(values.isfinite().all()):
                    raise UserError(f"{file}: {name} is not finite", "use an earlier checkpoint of the run")
                changes = changes or ("lora_B" in name or "lora_" not in name) and bool(values.any())
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file ({error})", REPAIR) from None
    if not changes:
        raise UserError(
            f"{file}: all lora_B matrices are zero, so the adapter changes nothing",
            "it was saved before training; let the run finish",
        )


def _adapter_settings(file: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})", REPAIR) from None
    return settings


def _name_base(file: Path, base: str, revision: str | None) -> None:
    """Writes the base's public name into adapter_config.json, which names a folder of this machine."""
    settings = _adapter_settings(file)
    settings["base_model_name_or_path"] = base
    settings["revision"] = revision
    write_json(file, settings, indent=2)


# -- the hub ---------------------------------------------------------------------------------------
def check_upload(repository: str, base: str) -> None:
    """Looks at what an upload needs, before the folder is made. Nothing is sent.

    Args:
        repository: `owner/name`.
        base: the base that the adapter names.

    Raises:
        UserError: a name that the hub does not take, a base that others cannot load, no token, or
            HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for flag, value in (("--push", repository), ("--base-name", base)):
        try:
            validate_repo_id(value)
            bad = value.count("/") != 1
        except HFValidationError:
            bad = True
        if bad and flag == "--push":
            raise UserError(f"--push {value} is no name of the hub", "give owner/name")
        if bad:
            raise UserError(
                f"the adapter's base is {value}, which is no name of the hub: others could not load it",
                "give --base-name owner/name, the model on the hub with the same weights",
            )
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"--push {repository}: HF_HUB_OFFLINE forbids the network",
            "unset HF_HUB_OFFLINE, or leave --push out and upload the folder elsewhere",
        )
    if not get_token():
        raise UserError(f"--push {repository}: there is no token of the hub", LOG_IN)


def push_to_hub(folder: Path, repository: str, public: bool) -> str:
    """Uploads a folder that `write_adapter` made; returns its address.

    Args:
        folder: what is uploaded, all of it.
        repository: `owner/name`; it is made if it does not exist.
        public: whether a new repository is public.

    Raises:
        UserError: the hub is not reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapter trained by gdrt_ds")
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = LOG_IN if status in (401, 403) else "try again later; the folder is complete"
        raise UserError(f"--push {repository}: the hub answered {_first_line(error)}", fix) from None
    except OSError as error:  # connections that fail are among them
        raise _not_reached(api, repository, folder, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in (
            "httpx",
            "httpcore",
            "httpx2",
            "httpcore2",
            "requests",
        ):
            raise
        raise _not_reached(api, repository, folder, error) from None
    return str(address)


def _not_reached(api: Any, repository: str, folder: Path, error: Exception) -> UserError:
    return UserError(
        f"--push {repository}: {api.endpoint} is not reached ({_first_line(error)})",
        f"the folder is complete; push it from a machine with a network: hf upload {repository} {folder}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
