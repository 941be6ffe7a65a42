"""What tests of the command line ask of a result (exit code, stdout, stderr), and two processes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
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


def in_two_processes(script: Path, *arguments: str) -> None:
    """Run a script under torchrun, in two processes on a free port, to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
