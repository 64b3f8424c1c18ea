"""Text from tokens that arrive one by one."""

from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens into text, each character once all of its tokens are there.

    A token may be a part of a character, and what it reads as may depend on the token
    before it, so the last tokens are decoded together and only what they add is returned.

    Args:
      decode: from tokens to text, U+FFFD for bytes that are no UTF-8 (yet).
      prompt: the tokens before, whose text is not repeated.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(prompt)
        self._shown = len(self._tokens)

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, "" where a character is still unfinished."""
        self._tokens.append(token)
        text = self._added()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self._tokens = self._tokens[self._shown :]
            self._shown = len(self._tokens)
        return text

    def rest(self) -> str:
        """Returns what is left, as U+FFFD, when no more tokens follow."""
        return self._added()

    def _added(self) -> str:
        before = self._decode(self._tokens[: self._shown])
        return self._decode(self._tokens)[len(before) :]
