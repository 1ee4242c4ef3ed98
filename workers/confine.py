"""Becomes another command that can write only below given folders: `confine.py FOLDER... -- COMMAND...`.

What a user submits decides what trainers, imports and engines do. Should one of them be made to do what it
should not, it still cannot change the files of other jobs, the keys or the database, nor signal a process
outside. The kernel's Landlock holds it to that, and needs no root; reading is not restricted. A kernel
without it (before 5.19, or built so) lets the command write, after a line on standard error.

Root's capabilities go as well, or what root starts could read the environment of a worker, where addresses
and passwords are: CAP_PERFMON and CAP_SYS_ADMIN open it past Landlock. Without them the kernel asks whether
the reader has all capabilities of the worker, and Landlock whether the worker is one of those it holds.

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
_CAPABILITY_VERSION = 0x20080522  # include/uapi/linux/capability.h
_CAP_IPC_LOCK = 1 << 14  # RDMA may need it to pin memory, and it opens nothing of others

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


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inherited", ctypes.c_uint32),
    )


def give_up_privileges() -> None:
    """Keep no capability that this process may have but one, and let no command that it becomes gain any.

    The user stays the same: root's own files and devices remain root's.
    """
    # With this, exec gives root no more than the process has, whatever the bounding set allows: that could
    # only be emptied by those who have CAP_SETPCAP, which containers may lack.
    _checked(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header, both = (
        _CapabilityHeader(_CAPABILITY_VERSION, 0),
        (_Capabilities * 2)(),
    )  # of numbers below 32, above
    _checked(_LIBC.capget(ctypes.byref(header), both))
    kept = both[0].permitted & _CAP_IPC_LOCK
    both[0], both[1] = _Capabilities(kept, kept, 0), _Capabilities(0, 0, 0)
    _checked(_LIBC.capset(ctypes.byref(header), both))


def confine(folders: list[str]) -> bool:
    """Let this process and its children write only below `folders` and on devices; False if it cannot be had.

    Asks for `give_up_privileges` first. Raises OSError for a folder that is not there.
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
    _checked(_LIBC.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)
    return True


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot be confined: {os.strerror(number)}")
    return result


def main() -> None:
    """Confine, then become the command."""
    end = sys.argv.index("--")
    folders, command = sys.argv[1:end], sys.argv[end + 1 :]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the rows of somebody's file
    give_up_privileges()
    if not confine(folders):
        print("This kernel has no Landlock: what runs here may write anywhere.", file=sys.stderr)  # noqa: T201
    os.execvp(command[0], command)  # noqa: S606 (a list of words, no shell)


if __name__ == "__main__":
    main()
