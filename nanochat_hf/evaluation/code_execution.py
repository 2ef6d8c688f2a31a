"""Running model-written programs for HumanEval: one process each, confined, and never trusted.

What a program may do is decided in `code_sandbox.py`, which the process runs before it: limits on time, memory, file
size and processes, no network, no environment, writes in its scratch folder only. Nothing it prints or leaves behind is
read; it has passed when the sandbox, after the last test, sends back a secret that the program was never given.

This confines careless programs and plain attacks through Python. It is no virtual machine: for models you do not trust,
run the whole evaluation in one.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SANDBOX = Path(__file__).with_name("code_sandbox.py")
TIMEOUT_SECONDS = 5.0
MEMORY_MIB = 256
NOBODY = 65534  # the user id a root evaluation gives programs


def passes_tests(prompt: str, completion: str, test: str, entry_point: str) -> bool:
    """Whether a completion passes a HumanEval row's tests, as nanochat puts the program together."""
    program = "\n\n".join([import_lines(prompt), extract_code(completion), test, f"check({entry_point})"])
    return runs_to_the_end(program)


def import_lines(prompt: str) -> str:
    """The import statements at the top of a prompt; a model that repeats the function often leaves them out."""
    lines = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            lines.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(lines)


def extract_code(completion: str) -> str:
    """The first fenced block of a completion, else all of it."""
    fenced = re.search(r"```(?:python)?\s*\n(.*?)\n```", completion, re.DOTALL)
    return (fenced[1] if fenced else completion).strip()


def runs_to_the_end(program: str, timeout_seconds: float = TIMEOUT_SECONDS, memory_mib: int = MEMORY_MIB) -> bool:
    """Whether a program ends without an exception within its limits."""
    secret = secrets.token_hex(16).encode()
    source = program.encode("utf-8", "replace")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as scratch:
        os.chmod(scratch, 0o777)
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(SANDBOX),
                str(len(source)),
                str(timeout_seconds),
                str(memory_mib),
                str(NOBODY),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env={},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(source + secret, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            # Whatever it has started dies with it.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    return process.returncode == 0 and answer == secret
