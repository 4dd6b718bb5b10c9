"""The hub of data sets and models: where it cannot be reached, the cache is used, and failures are told at once."""

import contextlib
import functools
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from lora_dp.extras import needing

# Long enough for a slow network; what follows is a download of many seconds.
_SECONDS = 5.0


def host() -> str:
    """Of the hub, or of the mirror that HF_ENDPOINT names."""
    return urllib.parse.urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


@functools.cache
def reachable() -> bool:
    """Whether the hub can be reached, asked once in a process; taken for granted behind a proxy."""
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if address.scheme in urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((host(), address.port or 443), timeout=_SECONDS):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def hub(name: str) -> Iterator[None]:
    """Inside, a name on the hub is opened, from the cache where it cannot be reached; retries are not shown.

    Nothing is asked of the network for a ``name`` that is there as a local folder or file.
    """
    if Path(name).expanduser().exists():
        yield
        return
    with needing(f"the name {name}", "fed"):
        from datasets import config

    logger = logging.getLogger("huggingface_hub.utils._http")
    level, before, own = logger.level, constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    if not (before or own or reachable()):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before, own


def unreachable(name: str) -> str:
    """Why a name could not be opened where :func:`reachable` is false, and the remedy."""
    return f"{host()} cannot be reached and {name} is not in the cache: check the network, or give a local folder"
