"""What the kernel takes away from a program: namespaces, a file system of its own, system calls, resources.

Linux only, through ctypes, because the standard library of Python 3.11 has no `unshare`, `mount` or `prctl`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC = 32, 1024, 2048, 4096, 16384
_MS_PRIVATE, _MS_RELATIME = 1 << 18, 1 << 21
# A mount inherited from a stronger user namespace keeps these; leaving one out of a remount is refused.
_KEPT_FLAGS = ((2, _MS_NOSUID), (4, _MS_NODEV), (8, _MS_NOEXEC), (1024, _MS_NOATIME), (2048, _MS_NODIRATIME))
_ST_RELATIME = 4096

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_MNT_DETACH = 2
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_DEVICES = ("null", "zero", "random", "urandom")
_NOBODY_BASE = 1_500_000_000

# Numbers on x86-64 and 64-bit ARM of calls that reach other processes, the network or the kernel's rarer parts.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_FORBIDDEN = {
    "socket": (41, 198),
    "connect": (42, 203),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_FORK = {0: (57, 58), 1: ()}  # fork and vfork, where there are such calls
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), 435, 0x00010000

# Operations of a filter (BPF), and what it answers: EPERM, ENOSYS, the end of the process, or the call itself.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_REFUSE, _UNKNOWN, _KILL, _ALLOW = 0x00050001, 0x00050026, 0x80000000, 0x7FFF0000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones. Raises OSError where the kernel refuses."""
    _check(_libc.unshare(flags), "unshare")


def can_change_user() -> bool:
    """Whether this process is root with the privileges of root, and not only in name."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    return bool(effective >> 21 & 1 and effective >> 7 & 1)  # CAP_SYS_ADMIN, CAP_SETUID


def enter_namespaces(root: str, readable: list[str], scratch_bytes: int, *, is_root: bool) -> None:
    """New mount, network, IPC and host-name namespaces, and a file system that holds little.

    root       an empty folder that becomes "/": memory-backed, with a writable /tmp of `scratch_bytes`
    readable   folders that are visible, read-only
    is_root    a real root needs no user namespace and can later become a user that owns nothing

    There is no /proc, no home and no network, not even a loopback interface that is up.
    """
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if is_root:
        unshare(flags)
    else:
        uid, gid = os.getuid(), os.getgid()
        unshare(flags | CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in (*_SYSTEM, *readable):
        _show(path, root)
    os.mkdir(f"{root}/dev")
    for name in _DEVICES:
        with open(f"{root}/dev/{name}", "w"):
            pass
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _MS_BIND)
    os.mkdir(f"{root}/tmp")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={scratch_bytes},nr_inodes=1024,mode=1777")
    _mount(None, root, None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.chdir(root)
    # Both at ".": the old root lies on top of the new one, and is unmounted from there.
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")


def _show(path: str, root: str) -> None:
    """Make `path` visible under `root`, read-only; links stay links, and what is there already is left alone."""
    target = root + path
    if not os.path.isdir(path) or os.path.lexists(target):
        return
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    os.makedirs(target)
    _mount(path, target, None, _MS_BIND | _MS_REC)
    held = os.statvfs(target).f_flag
    flags = sum(flag for bit, flag in _KEPT_FLAGS if held & bit) | (_MS_RELATIME if held & _ST_RELATIME else 0)
    _mount(None, target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    data = None if options is None else options.encode()
    _check(_libc.mount(*words, ctypes.c_ulong(flags), data), f"mount {target}")


def drop_privileges(uid_offset: int, *, is_root: bool) -> None:
    """Become a user that owns nothing (real root), or give up every capability of the user namespace.

    `uid_offset` tells programs that run at the same time apart: a limit on processes counts those of a user.
    """
    if is_root:
        uid = _NOBODY_BASE + uid_offset
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        _check(_libc.capset(header, bytes(24)), "capset")
    no_new_privileges()


def no_new_privileges() -> None:
    """No program that is started from here on gains rights, such as those of a set-uid file."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def hide_memory() -> None:
    """Other processes of the same user cannot attach to this one or read its memory."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def die_with_parent() -> None:
    """SIGKILL when the parent ends. To be called after a change of user, which resets it."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "pdeathsig")


def adopt_orphans() -> None:
    """Descendants whose parent ended become children of this process, which can then wait for them."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")


def forbid_calls(*, may_fork: bool) -> None:
    """Answer EPERM to the system calls of `_FORBIDDEN`, in this process and all that it starts.

    may_fork  whether it may start processes; threads it may always start. Without a pid namespace a process could
              outlive its group, and a real root has no limit on processes
    Raises OSError where there is no seccomp or no table for the machine.
    """
    machine = platform.machine()
    column = ("x86_64", "aarch64").index(machine) if machine in _AUDIT_ARCH else None
    if column is None:
        raise OSError(f"no table of system calls for {machine}")
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
    ]
    if machine == "x86_64":  # the x32 numbers of the same calls
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_ANSWER, 0, 0, _KILL)]
    for numbers in _FORBIDDEN.values():
        program += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_ANSWER, 0, 0, _REFUSE)]
    if not may_fork:
        program += _forks(column)
    program.append((_ANSWER, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    memory = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(memory)))
    no_new_privileges()
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def _forks(column: int) -> list[tuple[int, int, int, int]]:
    """Refuse every new process. `clone3` hides its flags, but the C library falls back from it to `clone`."""
    lines = [(_JUMP_EQUAL, 0, 1, _CLONE3), (_ANSWER, 0, 0, _UNKNOWN)]
    for number in _FORK[column]:
        lines += [(_JUMP_EQUAL, 0, 1, number), (_ANSWER, 0, 0, _REFUSE)]
    lines += [
        (_JUMP_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, 16),  # its first argument, the flags
        (_JUMP_SET, 1, 0, _CLONE_THREAD),
        (_ANSWER, 0, 0, _REFUSE),
    ]
    return lines


def limit_resources(*, cpu_seconds: int, memory_bytes: int, file_bytes: int, num_processes: int) -> None:
    """Limits of this process and those that it starts; each has its own CPU time and memory."""
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, num_processes),
    ):
        hard = resource.getrlimit(kind)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (value, value))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or hard > cpu_seconds:  # SIGXCPU first, SIGKILL to whoever ignores it
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
