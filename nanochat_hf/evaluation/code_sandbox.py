"""What a model-written program runs in; started by `code_execution.py` as a script, with the standard library alone.

Three fences, each for what the others miss: limits of the operating system; no network and another user, where the
process may arrange them; and an audit hook, which Python consults before it opens, starts, signals or connects
anything, and which no Python code can take away.

    python -I -S code_sandbox.py NUM_BYTES SECONDS MEMORY_MIB USER < program_and_secret > secret
"""

import os
import resource
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that are refused whatever their arguments, by the part before the first dot or the whole name.
REFUSED = frozenset(
    "socket subprocess ctypes winreg ftplib http imaplib poplib smtplib telnetlib urllib webbrowser pty fcntl shutil "
    "os.fork os.forkpty os.exec os.posix_spawn os.spawn os.system os.kill os.killpg os.chmod os.chown os.chflags "
    "os.chdir os.link os.symlink os.truncate os.putenv os.unsetenv os.setxattr os.removexattr os.rename os.utime "
    "signal.pthread_kill resource.setrlimit resource.prlimit syslog.syslog sys.addaudithook sys.settrace "
    "sys.setprofile gc.get_objects gc.get_referrers gc.get_referents".split()
)
# What starts programs, connects, or opens files from C, where the hook is not asked; the last line would give the
# program a second `os._exit`, or an interpreter without the hook.
REFUSED_IMPORTS = frozenset(
    "_ctypes ctypes _posixsubprocess multiprocessing _multiprocessing _posixshmem _socket socket sqlite3 _sqlite3 dbm "
    "_dbm _gdbm readline tkinter _tkinter ossaudiodev "
    "posix _interpreters _xxsubinterpreters _testcapi _testinternalcapi".split()
)


def limit(seconds: float, memory_mib: int) -> None:
    """Limits no program can raise again."""
    whole_seconds = int(seconds) + 1
    for kind, amount in (
        (resource.RLIMIT_CPU, whole_seconds),
        (resource.RLIMIT_AS, memory_mib * 2**20),
        (resource.RLIMIT_DATA, memory_mib * 2**20),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        try:
            resource.setrlimit(kind, (amount, amount))
        except (ValueError, OSError):  # macOS knows no RLIMIT_AS
            pass


def leave_network_and_rights(user: int) -> None:
    """A network namespace of its own, without any interface, and for root another user, where the system allows.

    As another user, signals and files of others are out of reach, and RLIMIT_NPROC counts (root's processes are never
    limited). One right is kept, to read files: the interpreter may lie where only root can read.
    """
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000):  # CLONE_NEWNET
            libc.unshare(0x40000000 | 0x10000000)  # with CLONE_NEWUSER, for ordinary users
    except (ImportError, OSError, AttributeError):  # no libc to call (macOS): the audit hook refuses sockets
        libc = None
    if os.getuid() == 0:
        if libc is not None:
            libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if libc is not None:
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
            reading = 1 << 2  # CAP_DAC_READ_SEARCH: effective, permitted, inheritable, for each half
            libc.capset(header, (ctypes.c_uint32 * 6)(reading, reading, 0, 0, 0, 0))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]


def make_audit_hook(scratch: str):
    """A hook that refuses what a solution to an exercise never needs."""

    def is_inside(path) -> bool:
        if isinstance(path, int):
            return False
        full = os.path.realpath(os.path.join(scratch, os.fsdecode(path)))
        return full == scratch or full.startswith(scratch + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event in REFUSED or event.partition(".")[0] in REFUSED:
            raise PermissionError(f"not in the sandbox: {event}")
        if event == "import" and arguments[0].partition(".")[0] in REFUSED_IMPORTS:
            raise PermissionError(f"not in the sandbox: import {arguments[0]}")
        if event == "open" and arguments[0] is not None:
            path, mode, flags = arguments
            writes = bool(flags & WRITING) or (isinstance(mode, str) and not set(mode).isdisjoint("wax+"))
            # `os.open` (no mode) may take a relative path from a folder that the hook is not told.
            is_hidden = mode is None and not isinstance(path, int) and not os.path.isabs(os.fsdecode(path))
            if writes and (is_hidden or not is_inside(path)):
                raise PermissionError(f"not in the sandbox: writing {path!r}")
        if event in ("os.remove", "os.rmdir", "os.mkdir") and (arguments[-1] != -1 or not is_inside(arguments[0])):
            raise PermissionError(f"not in the sandbox: {event} {arguments[0]!r}")

    return hook


def read_exactly(descriptor: int, num_bytes: int) -> bytes:
    """So many bytes and no more: what follows in the pipe is not for the program."""
    data = b""
    while len(data) < num_bytes:
        piece = os.read(descriptor, num_bytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def main(num_bytes: int, seconds: float, memory_mib: int, user: int) -> None:
    source = read_exactly(0, num_bytes).decode()
    scratch = os.path.realpath(os.getcwd())
    secret_from, answer_to = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    leave_network_and_rights(user)
    limit(seconds, memory_mib)
    sys.addaudithook(make_audit_hook(scratch))
    sys.argv = [""]
    program = compile(source, "program", "exec")
    for module in (os, sys.modules[os.name]):
        del module._exit  # so that whoever ends before the last line ends with an error
        for name in {"mkfifo", "mknod", "chroot"} & set(vars(module)):  # the hook is not asked about these
            delattr(module, name)
    try:
        exec(program, {"__name__": "__main__"})
    except:  # noqa: E722 - SystemExit(0) too: who leaves early has not passed. No name here that programs could replace
        1 / 0  # noqa: B018 - the process ends with status 1
    os.write(answer_to, read_exactly(secret_from, 32))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
