"""Half characters in JSON: bytes of a file name that are not UTF-8 are such in Python (PEP 383), and a cut text may end in half of a pair."""

import json
from typing import Any


def texts_are_whole(text: str) -> bool:
    """Whether no text in this JSON holds half of an escaped pair, which is no character: tokenizers and files would refuse it later."""
    try:
        json.dumps(json.loads(text, object_hook=_without_names), ensure_ascii=False).encode()
        json.dumps(json.loads(text), ensure_ascii=False).encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _without_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Names may be those of files, whose bytes that are not UTF-8 are half characters."""
    return {key: value for key, value in fields.items() if key not in ("image_id", "question_id")}
