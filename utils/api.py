"""The client for OpenAI-compatible APIs."""

import os
from typing import Any
from urllib.parse import urlsplit

# What the openai client would send to any server, the last one even in place of the key that it is given.
OPENAI_VARIABLES = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")


def is_local(url: str) -> bool:
    """Whether an address is on this machine, where no proxy leads."""
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def make_client(url: str, key: str, **options: Any) -> Any:
    """An asynchronous openai client that sends nobody's key and account but these.

    Args:
        url: Of the API, with its /v1.
        key: Of the API.
        **options: `max_retries`, `timeout`.
    """
    import openai

    for variable in OPENAI_VARIABLES:
        os.environ.pop(variable, None)
    direct = openai.DefaultAsyncHttpxClient(trust_env=False) if is_local(url) else None
    return openai.AsyncOpenAI(base_url=url, api_key=key, http_client=direct, **options)
