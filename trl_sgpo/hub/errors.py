"""Turns errors of the Hub's client into one line that names the fix."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import SGPOError


_ADVICE = {
    401: "log in with `hf auth login` or pass the `token` of an account that may",
    403: "pass a `token` that has the permission for it",
    404: "check the name and the revision and, if it is private, log in with `hf auth login` or pass a `token`",
    409: "someone else is changing it: try again",
    412: "someone else has changed it meanwhile: try again, or without `parent_commit` if you pass it",
    429: "too many requests: try again in a few minutes",
}


@contextmanager
def readable_errors(action: str, kind: type[SGPOError]) -> Iterator[None]:
    """
    Turns errors of the Hub's client into one line that names the fix.

    Args:
        action (`str`):
            The action that failed: the beginning of the message.
        kind (`type`):
            Class of the error that is raised.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HTTPError | OfflineModeIsEnabled):
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            reason = f"status {status}"
            advice = _ADVICE.get(status, cause.server_message or "the Hub refused it: check the arguments")
            if status >= 500:
                advice = "the Hub has a problem of its own: try again in a few minutes"
        elif isinstance(cause, OfflineModeIsEnabled):
            reason, advice = "offline mode", "unset HF_HUB_OFFLINE and try again"
        elif isinstance(error, HFValidationError):
            reason, advice = "no name of a repository", "name it as user/name"
        elif cause is not None or isinstance(error, LocalEntryNotFoundError):
            reason, advice = "no connection", "check the network and try again, which is safe also if part was done"
        else:
            reason, advice = type(error).__name__, str(error).strip().partition("\n")[0]
        raise kind(f"{action} failed ({reason}): {' '.join(advice.split()).rstrip('.')}.") from error


def may_pass(error: BaseException) -> bool:
    """Whether an error that [`readable_errors`] raised may be temporary."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code >= 500 or cause.response.status_code in (409, 429)
    return cause is not None
