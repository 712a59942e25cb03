"""Published weights as files: finding them on this machine, asking for them with a short wait, fetching them.

The libraries that own the weights wait and retry for minutes if there is no network. So nothing is asked of them before
a short request has shown that the file can be had.
"""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from ..errors import ConfigError, WeightsError
from .timm_networks import timm_settings

PROBE_SECONDS = 3.0
"""Longest wait for the sign that a file can be fetched."""

_SUFFIXES = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Download:
    """A published weight file.

    Attributes:
        name: the weights and their publisher.
        repository: on the Hugging Face Hub, or None.
        files: the names that it may have there.
        url: its address if it is not on the Hub.
        place: a path at which it is found if it was put there by hand.
    """

    name: str
    repository: str | None
    files: tuple[str, ...]
    url: str | None
    place: Path


def published_weights(network: str) -> Download | None:
    """Return the published weights of ``torchvision:NAME`` or ``timm:NAME``, None for the project's own networks.

    Raises:
        ConfigError: if the library has none of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    library, colon, name = network.partition(":")
    if not colon:
        return None
    return _of_torchvision(name) if library == "torchvision" else _of_timm(name)


def torchvision_weights(name: str) -> Any:
    """Return torchvision's record of the weights that ``pretrained`` means.

    Raises:
        ConfigError: if it has none of that name.
    """
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"torchvision has no pretrained weights for {name!r}: {error}") from error


def _of_torchvision(name: str) -> Download:
    weights = torchvision_weights(name)
    return Download(f"torchvision's {weights}", None, (), weights.url, _checkpoints() / Path(weights.url).name)


def _of_timm(name: str) -> Download:
    settings = timm_settings(name)
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise ConfigError(f"timm has no pretrained weights for {name!r}")
    if settings.hf_hub_id:
        named = settings.hf_hub_filename
        files = (named,) if named else ("model.safetensors", "pytorch_model.bin")
        short = settings.hf_hub_id.rpartition("/")[2]
        # A tag after a dot is part of the name, not a suffix.
        place = _checkpoints() / f"{short.replace('.', '-')}{Path(files[0]).suffix}"
        return Download(f"{settings.hf_hub_id} of the Hugging Face Hub", settings.hf_hub_id, files, None, place)
    file = Path(urlsplit(settings.url).path).name
    return Download(f"timm's {file}", None, (), settings.url, _checkpoints() / file)


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def file_at_hand(download: Download) -> Path | None:
    """Return the file if it is on this machine, in the library's cache or put there by hand; no network is used."""
    if download.repository is not None:
        from huggingface_hub import try_to_load_from_cache

        for file in download.files:
            found = try_to_load_from_cache(download.repository, file)
            if isinstance(found, str):
                return Path(found)
        places = [download.place.with_name(download.place.stem + suffix) for suffix in _SUFFIXES]
        return next((place for place in places if place.is_file()), None)
    return download.place if download.place.is_file() else None


def can_be_fetched(download: Download) -> bool:
    """Return whether the file can be fetched now; takes at most PROBE_SECONDS."""
    return _reachable_file(download) is not None


def _reachable_file(download: Download) -> str | None:
    """Return the address of the file if its server answers that it has it."""
    if download.repository is None:
        addresses = [str(download.url)]
    else:
        from huggingface_hub import constants, hf_hub_url

        if constants.HF_HUB_OFFLINE:
            return None
        addresses = [hf_hub_url(download.repository, file, endpoint=constants.ENDPOINT) for file in download.files]
    found: list[str] = []

    def probe() -> None:
        found.extend(address for address in addresses if not found and _answers(address))

    # Looking up a host name has no time limit, so it is done beside.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[0] if found else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirection as the answer: storage servers refuse requests of this kind."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _answers(address: str) -> bool:
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "scan-fast"})
    try:
        urllib.request.build_opener(_NoRedirect).open(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code < 400
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def fetch(download: Download, backbone: str) -> Path:
    """Return the file, downloading it if it is not on this machine.

    Args:
        download: the file.
        backbone: the name under which it is asked for, for the error.

    Raises:
        WeightsError: if it cannot be fetched; the message says what to do. Without a network that takes seconds.
    """
    found = file_at_hand(download)
    if found is not None:
        return found
    address = _reachable_file(download)
    if address is None:
        host = _host(download)
        raise WeightsError(_advice(download, backbone, f"{host} was not reached or does not offer them"))
    try:
        if download.repository is None:
            download.place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(download.place), _hash_in(download.place.name))
            return download.place
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(download.repository, address.rpartition("/")[2]))
    except Exception as error:  # the libraries raise errors of many packages
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(_advice(download, backbone, f"fetching them failed ({reason})")) from error


def _host(download: Download) -> str:
    if download.repository is None:
        return str(urlsplit(str(download.url)).netloc)
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT


def _advice(download: Download, backbone: str, problem: str) -> str:
    return (
        f"model.backbone={backbone}: the weights {download.name} are not on this machine and {problem}; "
        f"give model.weights=FILE, put the file at {download.place}, or train from scratch with model.pretrained=false"
    )


def _hash_in(name: str) -> str | None:
    """Return the start of the file's SHA-256 that such names carry, as in resnet50-0676ba61.pth."""
    found = torch.hub.HASH_REGEX.search(name)
    return found.group(1) if found else None
