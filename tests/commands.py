"""What tests of the command line ask of a result: (exit code, stdout, stderr)."""

from __future__ import annotations

import json
import re
from typing import Any


def bad(result: tuple[int, str, str], message: str) -> None:
    """Exit code 2, nothing on stdout, the message and no traceback on stderr."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert re.search(message, err), err


def document(result: tuple[int, str, str]) -> Any:
    """Exit code 0; the JSON on stdout."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)
