"""Runs a model's Python code in a process without files, network and other processes; returns its output.

Linux on x86_64 and aarch64. The process runs this same file: it imports modules, limits itself, gives up all
system calls but harmless ones (seccomp) and then runs the code. Nothing that the code does, through ctypes
either, gets it a file, a socket, another process or a signal to one.
"""

import ast
import builtins
import ctypes
import importlib
import io
import linecache
import os
import platform
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import BuiltinImporter, FrozenImporter
from typing import NoReturn

MAX_CHARACTERS = 10_000
"""Characters of output that are returned: the first HEAD and the last of what remains."""
HEAD = 7_500
MAX_BYTES = 32 * 2**20
"""Bytes of output after which the code is stopped."""
MAX_SECONDS = 86_400
START_SECONDS = 120
"""How long the process may take to start and import its modules."""
RESERVE = 16 * 2**20
"""Bytes that are freed after an exception, so that its traceback can be formatted."""
FRAMES = 8
"""Frames of a traceback that are printed, the last ones."""
READY = b"ready"
"""What the process writes to stderr once it is locked and starts the code."""
FINISHED = 64
"""Exit status of a process whose code ran to its end or raised."""
NAME = "<code>"
"""File name of the code in its tracebacks."""

MODULES = (
    *("abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy"),
    *("dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq"),
    *("io", "itertools", "json", "math", "numbers", "operator", "pprint", "random", "re", "statistics"),
    *("string", "struct", "sys", "textwrap", "time", "traceback", "types", "typing", "unicodedata", "zlib"),
)
"""Modules that code may import; numpy, mpmath and sympy besides, where they are installed."""
LAZY_MODULES = ("_strptime", "encodings.ascii", "encodings.latin_1", "encodings.utf_16", "encodings.utf_32")
"""Modules that those import only when a function needs them."""
LARGE_MODULES = {
    "numpy": ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random"),
    "mpmath": ("mpmath",),
    "sympy": (
        *("sympy", "sympy.abc", "sympy.assumptions.facts", "sympy.assumptions.handlers.matrices"),
        *("sympy.assumptions.lra_satask", "sympy.assumptions.satask"),
        *("sympy.codegen.abstract_nodes", "sympy.combinatorics.galois"),
        *("sympy.combinatorics.homomorphisms", "sympy.concrete.delta", "sympy.discrete.recurrences"),
        *("sympy.integrals.manualintegrate", "sympy.integrals.prde", "sympy.logic.algorithms.dpll"),
        *("sympy.logic.algorithms.dpll2", "sympy.logic.algorithms.minisat22_wrapper", "sympy.ntheory"),
        *("sympy.parsing.sympy_parser", "sympy.physics.units", "sympy.polys.dispersion"),
        *("sympy.polys.distributedmodules", "sympy.polys.domains.old_polynomialring"),
        *("sympy.polys.domains.quotientring", "sympy.polys.numberfields.resolvent_lookup"),
        *("sympy.printing.c", "sympy.sets.handlers.add", "sympy.sets.handlers.functions"),
        *("sympy.sets.handlers.issubset", "sympy.sets.handlers.mul", "sympy.sets.handlers.power"),
        *("sympy.sets.setexpr", "sympy.stats", "sympy.tensor.array.array_derivatives", "sympy.vector"),
        *("sympy.tensor.array.expressions.array_expressions", "secrets"),
    ),
}
"""Modules that take long to import, by the word in the code that makes the process import them."""

SYSTEM_CALLS = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10},
        **{"munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15},
        **{"writev": 20, "sched_yield": 24, "mremap": 25, "dup": 32, "dup2": 33, "pause": 34},
        **{"nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60},
        **{"gettimeofday": 96, "getrusage": 98, "times": 100, "getppid": 110, "rt_sigpending": 127},
        **{"rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "gettid": 186, "time": 201},
        **{"futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228},
        **{"clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "dup3": 292, "getrandom": 318},
    },
    "aarch64": {
        **{"dup": 23, "dup3": 24, "close": 57, "lseek": 62, "read": 63, "write": 64, "writev": 66},
        **{"fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101, "getitimer": 102},
        **{"setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115},
        **{"sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132},
        **{"rt_sigsuspend": 133, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136},
        **{"rt_sigtimedwait": 137, "rt_sigreturn": 139, "times": 153, "getrusage": 165},
        **{"gettimeofday": 169, "getpid": 172, "getppid": 173, "gettid": 178, "brk": 214, "munmap": 215},
        **{"mremap": 216, "mmap": 222, "mprotect": 226, "getrandom": 278},
    },
}
"""Numbers of the system calls that the code may make, by machine. None opens a file or a socket, starts a
process or a thread, signals a process or changes a limit. Nor madvise: as root it can poison memory."""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h: numbers of another architecture's system calls mean other calls."""
SECCOMP_CALLS = {"x86_64": 317, "aarch64": 277}
"""Number of the system call seccomp itself."""
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
"""Instructions of linux/bpf_common.h: BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K."""
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
"""Answers of linux/seccomp.h: SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO | EPERM."""
SET_MODE_FILTER, ALL_THREADS = 1, 1
"""SECCOMP_SET_MODE_FILTER and SECCOMP_FILTER_FLAG_TSYNC."""
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def run_python(code: str, *, seconds: float = 5.0, memory: int = 512 * 2**20) -> str:
    """What Python code prints, stderr included, and the value of its last line if that is an expression.

    An exception is returned as its traceback, and anything else that ends the code (time, memory, a crash, an
    exit) as a line in square brackets. Output over 10,000 characters is cut, with a line that says so. The
    code has no files, network, threads or other processes, and may import MODULES, numpy, mpmath and sympy.

    Args:
        code: Python source.
        seconds: time for the code in seconds, without the start of the process; at most a day.
        memory: bytes that the code may allocate over what Python and its modules take.

    Raises:
        ValueError: a bad argument, or a system that cannot lock the process; see `check_supported`.
        RuntimeError: the process could not start; the code has not run.
    """
    if not isinstance(code, str):
        raise ValueError(f"code ({type(code).__name__}) must be a str; pass Python source")
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds ({seconds}) must be above 0 and at most {MAX_SECONDS}; try 5")
    if not 0 < memory <= 2**50:
        raise ValueError(f"memory ({memory}) must be a number of bytes from 1 to 2**50; try 512 * 2**20")
    check_supported()
    arguments = [str(os.getpid()), str(int(seconds) + 2), str(int(memory))]
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    variables = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with open(os.memfd_create("code"), "w+b") as source:
        source.write(code.encode("utf-8", "surrogatepass"))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", os.path.abspath(__file__), *arguments],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=variables | dict.fromkeys(threads, "1"),
            cwd="/",
            start_new_session=True,
        )
    try:
        _wait_for_start(process)
        return _collect(process, seconds)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@lru_cache(maxsize=1)
def check_supported() -> None:
    """Raises ValueError where this system cannot lock a process, with the reason: not Linux, another machine
    than x86_64 and aarch64, a 32-bit Python, or a kernel or container without seccomp filters."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSTEM_CALLS or sys.maxsize < 2**32:
        raise ValueError(
            f"the sandbox for code needs 64-bit Linux on {' or '.join(SYSTEM_CALLS)}, and this is "
            f"{sys.platform} on {machine}; run on such a machine, or without code execution"
        )
    with suppress(OSError):
        _seccomp(machine, None)
        return
    if ctypes.get_errno() != 14:  # EFAULT: it would take a filter, and none was passed
        raise ValueError(
            f"the sandbox for code needs seccomp filters, and this system refuses them "
            f"({os.strerror(ctypes.get_errno())}); allow them in the kernel or container, or run without "
            "code execution"
        )


def _wait_for_start(process: subprocess.Popen) -> None:
    """Returns when the process starts the code. Raises RuntimeError when it does not come so far."""
    message = bytearray()
    for data in _chunks(process.stderr.fileno(), time.monotonic() + START_SECONDS):
        message += data
        if message.endswith(READY):
            return
    reason = message.decode(errors="replace")[-2000:] or f"nothing for {START_SECONDS} s, or killed"
    raise RuntimeError(f"the process for the code did not start; see that {sys.executable} runs: {reason}")


def _chunks(descriptor: int, deadline: float) -> Iterator[bytes]:
    """What arrives until the other end closes or `deadline` (of time.monotonic) is over."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while (remaining := deadline - time.monotonic()) > 0:
        if poll.poll(min(remaining, 60) * 1000 + 1):
            data = os.read(descriptor, 2**16)
            if not data:
                return
            yield data


def _collect(process: subprocess.Popen, seconds: float) -> str:
    """Output of the code, cut, and a line on what ended it unless it ran to its end."""
    deadline = time.monotonic() + seconds
    size, output, total = 4 * MAX_CHARACTERS, bytearray(), 0
    for data in _chunks(process.stdout.fileno(), deadline):
        output += data
        total += len(data)
        if len(output) > 4 * size:
            del output[size:-size]
        if total > MAX_BYTES:
            break
    text = output.decode(errors="replace")
    if len(text) > MAX_CHARACTERS:
        head = output[:size].decode(errors="replace")[:HEAD]
        tail = output[-size:].decode(errors="replace")[HEAD - MAX_CHARACTERS :]
        note = f"[cut: of {total:,} bytes, the first {HEAD:,} and last {len(tail):,} characters are here]"
        text = f"{head}\n{note}\n{tail}"
    end = f"stopped: it printed more than {MAX_BYTES // 2**20} MiB"
    if total <= MAX_BYTES:
        try:
            end = _name_end(process.wait(max(0.0, deadline - time.monotonic())), seconds)
        except subprocess.TimeoutExpired:
            end = f"stopped after {seconds:g} s"
    line = "\n" if text and not text.endswith("\n") else ""
    return f"{text}{line}[{end}]\n" if end else text


def _name_end(status: int, seconds: float) -> str:
    """What ended a process of this exit status, or nothing for code that ran to its end."""
    if status == FINISHED:
        return ""
    if status >= 0:
        return f"the code ended its process with exit status {status}"
    if -status == signal.SIGXCPU:
        return f"stopped after {seconds:g} s"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"the process of the code crashed or was killed: {name}"


def _seccomp(machine: str, program: ctypes.c_void_p | None) -> None:
    """Puts a filter on all threads of this process. Raises OSError when the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = (SECCOMP_CALLS[machine], SET_MODE_FILTER, ALL_THREADS)
    if libc.syscall(*map(ctypes.c_long, numbers), program) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _lock() -> None:
    """Leaves this process the system calls of SYSTEM_CALLS. Raises OSError when the kernel refuses that."""
    machine = platform.machine()
    numbers = sorted(SYSTEM_CALLS[machine].values())
    instructions = [
        (LOAD, 0, 0, 4),  # the architecture
        (JUMP_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
        *((JUMP_IF_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(buffer)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _seccomp(machine, ctypes.cast(header, ctypes.c_void_p))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


def _limit(what: int, value: int) -> None:
    """Lowers a limit of this process for good."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


class _NoFiles:
    """Last finder of the import system, after those of modules in the interpreter: names what there is."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn:
        available = ", ".join([*MODULES, *LARGE_MODULES])
        raise ModuleNotFoundError(f"no module {name} here; there are {available}", name=name)


def _prepare() -> str:
    """Reads code from stdin, imports what it may use and closes all files. Returns the code."""
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    large = (name for word, names in LARGE_MODULES.items() if word in code for name in names)
    for name in (*MODULES, *LAZY_MODULES, *large):
        with suppress(ImportError):
            importlib.import_module(name)
    _print_error(ZeroDivisionError("imports what tracebacks need"), io.StringIO())
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, _NoFiles]
    sys.argv[:] = [NAME]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with suppress(OSError):
                os.close(descriptor)
    return code


def _limit_itself(seconds: int, memory: int) -> None:
    """Limits this process to `seconds` of processor time and `memory` bytes over what it has taken."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, size + memory)
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + seconds)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _prctl(PR_SET_DUMPABLE, 0)  # a limit does not stop a core dump to a program


def _serve(parent: int, seconds: int, memory: int) -> NoReturn:
    """Reads code from stdin, locks this process, runs the code in it and exits. `parent` is the id of the
    process that started this one, `seconds` of processor time and `memory` in bytes are the code's limits."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    code = _prepare()
    reserve = [bytearray(RESERVE)]
    _limit_itself(seconds, memory)
    _lock()
    os.write(2, READY)
    os.dup2(1, 2)
    output = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "wb", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
    )
    sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = output
    status = FINISHED
    try:
        _execute(code)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            output.write(f"{error.code}\n")
    except BaseException as error:
        reserve.clear()
        with suppress(BaseException):
            sys.stdout.flush()
        try:
            _print_error(error, output)
        except BaseException:
            output.write(f"{type(error).__name__}\n")
        if isinstance(error, MemoryError):
            output.write(f"[out of memory: the code may use {memory / 2**20:g} MiB]\n")
    with suppress(BaseException):
        sys.stdout.flush()
    with suppress(BaseException):
        output.flush()
    os._exit(status & 0xFF)


def _execute(code: str) -> None:
    """Runs code as a program, and prints its last line's value as the interactive Python does."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    tree = compile(code, NAME, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
    exec(compile(tree, NAME, "exec", dont_inherit=True), main.__dict__)
    if last:
        exec(compile(ast.Interactive(last), NAME, "single", dont_inherit=True), main.__dict__)


def _print_error(error: BaseException, output: io.TextIOBase) -> None:
    """Prints the last frames of a traceback, without this file's own."""
    report = part = traceback.TracebackException.from_exception(error, limit=-FRAMES)
    while part:
        hidden = [
            frame for frame in part.stack if frame.filename in (__file__, "<frozen importlib._bootstrap>")
        ]
        part.stack = traceback.StackSummary.from_list([frame for frame in part.stack if frame not in hidden])
        part = part.__cause__ or part.__context__
    output.write("".join(report.format()))


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
