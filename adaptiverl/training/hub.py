"""The Hugging Face hub: where it does not answer, what was downloaded earlier is used at once.

Its libraries would ask again for minutes, for each file, and say so each time.
"""

import logging

import datasets.config
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError

SECONDS = 5.0  # that the hub has to answer


def go_offline_without_it() -> None:
    """As HF_HUB_OFFLINE=1 for this process if no connection to the hub is had; says so."""
    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except HTTPError as error:
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        logging.warning(
            "%s cannot be reached (%s): what was downloaded earlier is used",
            constants.ENDPOINT,
            error,
        )
