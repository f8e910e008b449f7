"""Keep text of a user from being parsed as control tokens.

Only what the template writes begins and ends turns. Rows without such text, nearly all, are made
into tokens as ever. In the others, the control tokens of the template are private signs to a copy
of the tokenizer that knows them by these signs alone, and those of the user are letters.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from unlora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# planes of Unicode for private use: control tokens of a user's text, and of the template
OF_USER, OF_TEMPLATE = 0x100000, 0xF0000
Tokens = tuple[list[int], list[tuple[int, int]]]


class ControlTokens:
    """The added tokens of a tokenizer that steer a conversation.

    They are its special tokens, and the others that the template writes (``<think>``); runs of
    white space are text.

    Args:
        template: the source of the chat template, or the tags.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer = tokenizer
        self.added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
        self.names = [
            token.content
            for token in self.added
            if not token.content.isspace() and (token.special or token.content in template)
        ]
        self.number = {name: i for i, name in enumerate(self.names)}
        longest_first = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        signs = "".join(chr(OF_USER + i) for i in range(len(self.names)))
        self.hidden_sign = re.compile(f"[{signs}]" if signs else "(?!)")

    def first_in(self, text: str) -> re.Match[str] | None:
        """The first control token in a text."""
        return self.pattern.search(text)

    def hide(self, text: str) -> str:
        """A user's text with a private sign for each control token, as a template may see it."""
        return self.pattern.sub(lambda match: chr(OF_USER + self.number[match[0]]), text)

    def are_hidden_in(self, text: str) -> bool:
        """Whether :meth:`hide` has hidden something in this text."""
        return bool(self.hidden_sign.search(text))

    def signed(self, text: str) -> str:
        """A text with the user's words as they were, and signs for the template's tokens."""
        text = self.pattern.sub(lambda match: chr(OF_TEMPLATE + self.number[match[0]]), text)
        return self.hidden_sign.sub(lambda match: self.names[ord(match[0]) - OF_USER], text)

    def encode_plain(self, text: str, *, add_special_tokens: bool) -> Tokens:
        """Tokens and offsets of a text in which nothing is a control token."""
        if self.first_in(text):
            return self.encode([text], add_special_tokens=add_special_tokens)[0]
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        return list(encoding.input_ids), encoding.offset_mapping

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Tokens]:
        """Tokens and offsets of :meth:`signed` texts.

        Raises:
            InputError: the tokenizer makes a control token of plain text.
        """
        if not texts:
            return []
        backend, ids_of = self._by_signs
        control = set(ids_of.values()) - set(ids_of)
        tokens = []
        for encoding in backend.encode_batch(list(texts), add_special_tokens=add_special_tokens):
            for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in control and begin < end:
                    raise InputError(
                        f"The tokenizer {self.tokenizer.name_or_path!r} reads "
                        f"{self.tokenizer.convert_ids_to_tokens(token)!r} as a control token even "
                        "where it is plain text. Leave it out of your rows."
                    )
            tokens.append(([ids_of.get(i, i) for i in encoding.ids], encoding.offsets))
        return tokens

    @cached_property
    def _by_signs(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy that knows control tokens by their signs, and its ids of them -> the true ids."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            if token["content"] in self.number:
                token["content"] = chr(OF_TEMPLATE + self.number[token["content"]])
        copy = Tokenizer.from_str(json.dumps(content))
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = False
        ids: dict[int, int] = {}
        for token in self.added:
            number = self.number.get(token.content)
            name = token.content if number is None else chr(OF_TEMPLATE + number)
            if (sign := copy.token_to_id(name)) is not None:
                ids[sign] = self.tokenizer.convert_tokens_to_ids(token.content)
        return copy, ids
