"""What is secret in settings and messages: values under names such as `token`, and user parts of addresses."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


HIDDEN = "***"

_SECRET = re.compile(
    r"(?:.*(?:token|password|passwd|passphrase|passcode|pwd|secret|credential|signature|api_?key|"
    r"(?:secret|access|private|account|signing)_?key)|"
    r"(?:.*_)?(?:auth|authorization|bearer|cookie|jwt|pat|sas|sig|dsn|connection_?string|session_id|access_key_id|"
    r"webhook|webhook_url))s?"
)
_OF_TEXT = re.compile(
    r"(?:(?!.*(?:access|refresh|api|auth|bearer|hub|hf)_tokens).*_)?"
    r"(?:tokens|(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video)_token)"
)
"""Names of tokens of a text, and of numbers of them."""

# Parts are bounded and begin at the start of a word, so that a text of megabytes takes no more than its length
_USER = re.compile(r"(?<![\w+.-])([a-z][a-z0-9+.-]{0,30}://)[^\s/?#\"<>]{0,1000}@", re.IGNORECASE)
_PAIR = re.compile(
    r"""(?P<before>(?P<quote>["']?)(?<![\w-])(?P<key>[\w-]{1,80})(?P=quote)\s{0,9}[:=]\s{0,9}(?P<mark>["']))"""
    r"""(?:(?:\\.|[^\\\n]){1,2000}?|.{1,2000}?)(?P=mark)"""
)
_PARAMETER = re.compile(r"(?P<before>[?&#](?P<key>[\w-]{1,80})=)(?:[^\s&#\"']|'(?=[\w%~-]))+(?P<mark>)")
_TOKEN = re.compile(r"(?<=\bBearer )[^\s\"',]+|(?<=\bAuthorization: Basic )[^\s\"',]+|\bhf_[A-Za-z0-9]{20,}")


def is_secret(key: str) -> bool:
    """Whether the values of a key, such as `hub_token` or `X-Api-Key`, are secret."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z0-9]+", "_", key).lower().strip("_")
    return bool(_SECRET.fullmatch(name)) and not _OF_TEXT.fullmatch(name)


def without_credentials(text: str) -> str:
    """A text without user parts of addresses, bearer tokens, and quoted values of secret keys."""

    def hide(found: re.Match[str]) -> str:
        return f"{found['before']}{HIDDEN}{found['mark']}" if is_secret(found["key"]) else found[0]

    text = _USER.sub(rf"\1{HIDDEN}@", text)
    for pattern in (_PAIR, _PARAMETER):
        text = pattern.sub(hide, text)
    return _TOKEN.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """
    Settings without secrets.

    Args:
        value (`Any`):
            Settings, or a value of them. Mappings and lists are copied; other objects stay as they are.

    Returns:
        `Any`: The same, with `"***"` instead of values of secret keys, at any depth, and of credentials in texts.
    """
    if isinstance(value, Mapping):
        return {
            redacted(key): HIDDEN if is_secret(str(key)) and each not in (None, "", True, False) else redacted(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    return without_credentials(value) if isinstance(value, str) else value


def without_sent(text: str, headers: Mapping[str, str]) -> str:
    """What a server answered, without the tokens in the headers that were sent to it."""
    for value in headers.values():
        if token := value.removeprefix("Bearer").strip():
            text = text.replace(token, HIDDEN)
    return text


def arguments_without_secrets(argv: list[str]) -> list[str]:
    """Arguments of a command, with `"***"` instead of what follows the options of secret keys."""
    shown: list[str] = []
    hide = False
    for argument in argv:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("--") and is_secret(option.removeprefix("--"))
        if hide and not argument.startswith("--"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{option}={HIDDEN}" if secret and equals else without_credentials(argument))
        hide = secret and not equals
    return shown


class WithoutSecrets:
    """Makes a configuration show no secrets, as text and as a dictionary, which trackers of runs log."""

    def to_dict(self) -> dict[str, Any]:
        """The settings, without secrets."""
        return redacted(super().to_dict())  # type: ignore[misc]

    def __repr__(self) -> str:
        settings = redacted({item.name: vars(self)[item.name] for item in fields(self)})  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    __str__ = __repr__
