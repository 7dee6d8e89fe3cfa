"""What all formats of XML need: an element's own name, and what a text may hold inside of one."""

import re
from typing import Any


def local(element: Any) -> str:
    """Its name without the namespace; "" of a comment and the like."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "", text)
