"""Messages as lines, without the libraries behind them."""

import re
from typing import Any


def one_line(message: Any) -> str:
    """A message as one printable line of bearable length: what it quotes may be anything, also a token.

    >>> one_line("no such\\ncolumn, and hf_aSecretToken")
    'no such column, and hf_...'
    """
    line = re.sub(r"\bhf_\w{8,}", "hf_...", " ".join(str(message).split()))
    line = re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", line)
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"
