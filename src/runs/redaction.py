"""Redact secrets and escape control characters in everything that is printed or written."""

import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "(hidden)"
OF_TEXT = ("stop", "eos", "bos", "pad", "unk", "cls", "prefix", "mask", "sep")  # eos_token: "</s>"
TOKEN = "".join(rf"(?<!{kind}_)" for kind in OF_TEXT) + "token"
WORDS = rf"{TOKEN}|passw(?:or)?d|passphrase|secret|api_?key|access_?key|private_?key|credentials?"
KEY = re.compile(rf"(?:{WORDS})$", re.IGNORECASE)  # hub_token, but not pad_token_id
# HF_TOKEN_FILE, PGPASSWORD, MYSQL_PWD; but not where the shell is
VARIABLE = re.compile(
    rf"(?:^|_)(?:{WORDS})(?:_|$)|passw(?:or)?d$|(?:^|_|ssh)pass$|_(?:pwd|pat|auth)$", re.IGNORECASE
)
# a setting begins a word, or a part of {...}: the value no_token:4 of another one is none
SETTING = re.compile(rf"(?<![^\s\[{{(,+~@'\"])[\w.-]*(?:{WORDS})\s*[=:]\s*(?=\S)", re.IGNORECASE)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# name:password, or a token in place of them; a name alone is no secret
USER_INFO = re.compile(r"(?<=://)(?:[^\s/@:'\"]*:[^\s/@'\"]+|(?=[^@]*\d)[\w-]{20,})(?=@)")
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|sk-[\w-]{0,40}[A-Za-z0-9]{20,}[\w-]*)\b"
)
SHORTEST = 8  # characters: a shorter value is found in texts that have nothing to do with it
LONGEST_WORD = 20  # letters; as many digits make a number
_of_configs: set[str] = set()


def is_secret(key: object, value: object) -> bool:
    """Whether a setting is a secret by its name: ``token``, ``hub_token``, ``api_key``."""
    is_set = value is not None and not isinstance(value, bool) and value != ""
    return is_set and KEY.search(str(key)) is not None


def without_secrets(content: Any) -> Any:
    """A config or manifest as it may be written; the secrets in it are remembered as such."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if is_secret(key, value):
                remember(value)
        return {
            key: HIDDEN if is_secret(key, value) else without_secrets(value)
            for key, value in content.items()
        }
    if isinstance(content, (list, tuple)):
        return [without_secrets(value) for value in content]
    return redacted(content) if isinstance(content, str) else content


def without_secrets_of_hydra(content: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config as Hydra composes it; in its own section stands what was typed."""
    public: dict[str, Any] = without_secrets(content)
    hydra = public.get("hydra")
    if isinstance(hydra, dict):
        for words in (hydra.get("overrides") or {}).values():
            words[:] = map(without_setting, words)
        if job := hydra.get("job"):
            job["override_dirname"] = without_setting(str(job.get("override_dirname")))
    return public


def remember(value: Any) -> None:
    """From here on, a secret is hidden wherever it stands."""
    if isinstance(value, Mapping):
        remember(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            remember(entry)
    else:
        _of_configs.add(str(value))


def without_setting(word: str) -> str:
    """A word of a command line, with the value hidden where it is a secret."""
    shown, end = "", 0
    for setting in SETTING.finditer(word):
        if setting.start() >= end:
            shown += word[end : setting.end()] + HIDDEN
            end = _end_of_value(word, setting)
    return redacted(shown + word[end:])


def remember_settings(words: Iterable[str]) -> None:
    """From here on, the secrets that are typed in these words are hidden wherever they stand."""
    for word in words:
        for setting in SETTING.finditer(word):
            value = word[setting.end() : _end_of_value(word, setting)]
            remember([value, *re.split(r"[\[\]{},:'\"]+", value)])


def _end_of_value(word: str, setting: re.Match[str]) -> int:
    """Where the value of a setting ends: it is all that follows, or a part of {...}."""
    before = word[: setting.start()]
    if not before.strip("+~@'\"") and "=" in setting[0]:
        return len(word) - (before[:1] in ("'", '"') and word.endswith(before[0]))
    depth, position = 0, setting.end()
    while position < len(word):
        if quoted := QUOTED.match(word, position):
            position = quoted.end()
            continue
        sign = word[position]
        if depth == 0 and sign in ",}]":
            break
        depth += (sign in "[{") - (sign in "]}")
        position += 1
    return position


def redacted(text: str) -> str:
    """A text without the secrets of this process, passwords in URLs, and tokens."""
    return SHAPES.sub(HIDDEN, USER_INFO.sub(HIDDEN, without_values(text, secrets())))


def without_values(text: str, values: tuple[str, ...]) -> str:
    """A text in which none of these is left."""
    for value in values:
        if value in text:
            text = text.replace(value, HIDDEN)
    return text


def secrets() -> tuple[str, ...]:
    """The secrets in the environment, by the names of their variables, and those of configs.

    A value that is a plain word or number is none of them: it stands in data, answers and paths
    that have nothing to do with it, and hiding it there would change them.
    """
    values = set(_of_configs)
    for name, value in os.environ.items():
        if VARIABLE.search(name) and not os.path.exists(value):
            values.add(value)
        values |= {info.partition(":")[2] or info for info in USER_INFO.findall(value)}
    known = (text for text in values if len(text) >= SHORTEST and not _is_plain(text))
    return tuple(sorted(known, key=len, reverse=True))


def _is_plain(value: str) -> bool:
    word = value.isalpha() and (value[1:].islower() or value.isupper())
    return len(value) <= LONGEST_WORD and (word or value.isdigit())


def printable(text: str) -> str:
    r"""The text without what a terminal obeys: escape sequences, control and direction signs.

    Each is shown as what it is, so that nothing is hidden: ``\x1b`` for an escape. Line breaks
    stay, and a tab is four spaces.
    """
    shown = []
    for sign in text.replace("\r\n", "\n").replace("\t", "    "):
        kind = unicodedata.category(sign)
        joins = sign in "\u200c\u200d"  # of emoji, and of scripts that need them
        obeyed = kind in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and not joins
        shown.append(sign.encode("unicode_escape").decode() if obeyed and sign != "\n" else sign)
    return "".join(shown)


def safe(text: str) -> str:
    """A message as a terminal or a log may show it."""
    return redacted(printable(text))


def guard_logs() -> None:
    """From here on, every message of a log and every traceback of this process is safe to show."""
    make = logging.getLogRecordFactory()
    if getattr(make, "safe", False):
        return

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            record.msg, record.args = safe(record.getMessage()), ()
        except (TypeError, ValueError):  # logging says so itself, without the message's values
            record.msg, record.args = safe(str(record.msg)), ()
        if record.name.startswith("hydra"):  # it tells the command line of each job
            record.msg = without_setting(record.msg)
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = safe(traceback_of(record.exc_info[1]))
        return record

    made.safe = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)
    sys.excepthook = lambda _, error, __: print(traceback_of(error), end="", file=sys.stderr)


def traceback_of(error: BaseException) -> str:
    """Its traceback, safe to show."""
    return safe("".join(traceback.format_exception(error)))
