"""Becomes another command that can write only below given folders: `confine.py FOLDER... -- COMMAND...`.

What a user submits decides what trainers, imports and engines do. Should one of them be made to do what it
should not, it still cannot change the files of other jobs, the keys or the database, nor signal a process
outside. The kernel's Landlock holds it to that, and needs no root; reading is not restricted. A kernel
without it (before 5.19, or built so) lets the command run as it is, after a line on standard error.

Runs as a script with nothing but the standard library, since every child process waits for it.
"""

import ctypes
import os
import resource
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
# The same numbers on every architecture (include/uapi/asm-generic/unistd.h, include/uapi/linux/landlock.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
# Removing, making each kind of file, and moving between folders.
_CHANGE_FOLDERS = sum(1 << bit for bit in range(4, 14))
_SIGNALS = 1 << 1
_ABI_MOVES, _ABI_TRUNCATE, _ABI_SIGNALS = 2, 3, 6  # the versions of Landlock that brought them


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def confine(folders: list[str]) -> bool:
    """Let this process and its children write only below `folders` and on devices; False if it cannot be had.

    Raises OSError for a folder that is not there.
    """
    abi = _LIBC.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if abi < _ABI_MOVES:
        return False
    on_files = _WRITE_FILE | (_TRUNCATE if abi >= _ABI_TRUNCATE else 0)
    wanted = _Ruleset(files=on_files | _CHANGE_FOLDERS, scoped=_SIGNALS if abi >= _ABI_SIGNALS else 0)
    size = ctypes.sizeof(_Ruleset) if abi >= _ABI_SIGNALS else 8
    rules = _checked(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(wanted), size, 0))
    # CUDA writes into the /proc of its own process, whose number nobody knows yet. Root's trainers could then
    # write what root may there: workers should run as another user, as those of docker-compose.yml do.
    devices = ("/dev", "/proc") if os.environ.get("CUDA_VISIBLE_DEVICES") else ("/dev",)
    for folder, allowed in [
        *((folder, wanted.files) for folder in (*folders, "/dev/shm")),  # noqa: S108 (of all processes)
        *((folder, on_files) for folder in devices),
    ]:
        place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = _Beneath(allowed=allowed, folder=place)
        _checked(_LIBC.syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(rule), 0))
        os.close(place)
    _checked(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_LIBC.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)
    return True


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result


def main() -> None:
    """Confine, then become the command."""
    end = sys.argv.index("--")
    folders, command = sys.argv[1:end], sys.argv[end + 1 :]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the rows of somebody's file
    if not confine(folders):
        print("This kernel has no Landlock: what runs here may write anywhere.", file=sys.stderr)  # noqa: T201
    os.execvp(command[0], command)  # noqa: S606 (a list of words, no shell)


if __name__ == "__main__":
    main()
