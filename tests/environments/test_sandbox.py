"""Python code that a model wrote: what it prints, and all that it must not do."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vlm_sapo.environments import sandbox
from vlm_sapo.environments.sandbox import MAX_CHARACTERS, SYSTEM_CALLS, check_supported, run_python


def processes_of(parent: int) -> list[str]:
    """Ids of sandbox processes that this process started, read from their command lines."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 3 and words[2].endswith(b"sandbox.py") and words[3] == str(parent).encode():
            numbers.append(folder.name)
    return numbers


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert processes_of(os.getpid()) == []


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(1)\n2 + 3", "1\n5\n"),
        ("x = 4", ""),
        ("None", ""),
        ("", ""),
        ("'ü' * 2", "'üü'\n"),
        ("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')", "a\nb\nc\n"),
        ("print('no newline', end='')", "no newline"),
        ("if __name__ == '__main__':\n    print('main')", "main\n"),
        ("def f(n):\n    return n and n + f(n - 1)\nf(100)", "5050\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nA()", "A(x=1)\n"),
        ("from datetime import datetime\ndatetime.strptime('2020-02-03', '%Y-%m-%d').day", "3\n"),
        ("import os\n'SECRET' in os.environ", "False\n"),
    ],
)
def test_prints_and_the_last_value_come_back(code, output, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    assert run_python(code) == output


def test_numpy_computes():
    assert run_python("import numpy as np\nprint(np.linalg.inv(np.eye(2) * 4))\nnp.random.rand(3).shape") == (
        "[[0.25 0.  ]\n [0.   0.25]]\n(3,)\n"
    )


def test_sympy_computes():
    code = """
import sympy as sp
from sympy.stats import Die, E
x, n = sp.symbols("x n")
print(sp.integrate(sp.exp(-x**2), (x, -sp.oo, sp.oo)), sp.simplify(sp.sin(x)**2 + sp.cos(x)**2))
print(sp.solve(x**2 - 2, x), sp.summation(n**2, (n, 1, x)).factor(), sp.limit(sp.sin(x) / x, x, 0))
print(sp.dsolve(sp.Function("f")(x).diff(x) - 1), sp.integrate(1 / (x**3 + 1), x) != 0, E(Die("D", 6)))
print(sp.diophantine(x**2 - n**2 - 15) != set(), sp.latex(sp.sqrt(x)), sp.lambdify(x, x**2)(3))
print(sp.solveset(sp.sin(x) - 1, x) != sp.S.EmptySet, sp.ask(sp.Q.even(4)), sp.sympify("1/2 + x"))
sp.Matrix([[2, 1], [1, 2]]).eigenvals()
"""
    lines = run_python(code, seconds=30).splitlines()
    assert lines[0] == "sqrt(pi) 1"
    assert lines[1] == "[-sqrt(2), sqrt(2)] x*(x + 1)*(2*x + 1)/6 1"
    assert lines[2] == "Eq(f(x), C1 + x) True 7/2"
    assert lines[3] == "True \\sqrt{x} 9"
    assert lines[4] == "True True x + 1/2"
    assert lines[5] == "{3: 1, 1: 1}"


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
        ("x = '\ud800'", "surrogates not allowed"),
        ("x = 1\0", "SyntaxError: source code string cannot contain null bytes"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "E: <exception str() failed>"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_exceptions_come_back_as_tracebacks(code, last):
    output = run_python(code)
    assert output.splitlines()[-1].endswith(last) and "sandbox.py" not in output


def test_a_traceback_shows_the_codes_lines():
    assert run_python("def f():\n    return int('a')\nf()").startswith(
        'Traceback (most recent call last):\n  File "<code>", line 3, in <module>\n    f()\n'
    )


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/sandbox_wrote_this', 'w').write('a')",
        "import os\nos.listdir('/')",
        "import os\nos.stat('/etc/passwd')",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(os.getppid(), 9)",
        "import os\nos.memfd_create('a')",
        "import os\nos.pipe()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    ],
)
def test_files_processes_and_signals_are_refused(code):
    output = run_python(code)
    assert "Operation not permitted" in output or "not allowed to raise maximum limit" in output
    assert not Path("/tmp/sandbox_wrote_this").exists()


def test_threads_and_shells_do_not_start():
    assert "can't start new thread" in run_python("import threading\nthreading.Thread(target=print).start()")
    path = "/tmp/sandbox_shell_wrote_this"
    assert run_python(f"import os\nos.system('touch {path}')") == "32512\n" and not Path(path).exists()


def test_other_modules_are_named_as_missing():
    output = run_python("import socket")
    assert "ModuleNotFoundError: no module socket here; there are abc" in output and "sympy" in output
    assert "Traceback" not in run_python("try:\n    import torch\nexcept ImportError:\n    print('none')")


def test_all_other_system_calls_are_refused_to_ctypes():
    allowed = set(SYSTEM_CALLS[platform.machine()].values())
    allowed |= {335, 336} if platform.machine() == "x86_64" else set()  # uretprobe, uprobe: only crash
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
passed = []
for number in [*range(600), *range(0x40000000, 0x40000000 + 600)]:
    if number not in {allowed}:
        ctypes.set_errno(0)
        if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
            passed.append(number)
print(passed)
print(libc.open(b"/etc/passwd", 0), libc.socket(2, 1, 0), libc.fork(), libc.kill(1, 0), libc.prctl(38, 0))
"""
    assert run_python(code) == "[]\n-1 -1 -1 -1 -1\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
def test_system_calls_of_32_bits_end_the_process():
    code = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
ctypes.memmove(page, bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]), 8)  # mov eax, 20 (getpid); int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(page)())
"""
    assert run_python(code).strip() in (
        "[the process of the code crashed or was killed: SIGSYS]",
        "[the process of the code crashed or was killed: SIGSEGV]",
    )


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
        "import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: 0\nwhile 1: 0",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "10 ** 10 ** 10",
    ],
)
def test_endless_code_is_stopped(code):
    start = time.monotonic()
    assert run_python(code, seconds=0.5) == "[stopped after 0.5 s]\n"
    assert time.monotonic() - start < 5


def test_output_before_the_stop_comes_back():
    assert run_python("print('before')\nwhile True: pass", seconds=0.3) == "before\n[stopped after 0.3 s]\n"


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 ** 9)",
        "x = []\nwhile True: x.append(' ' * 10 ** 5)",
        "x = []\nwhile True: x.append(object())",
        "import numpy\nnumpy.ones(10 ** 9)",
    ],
)
def test_memory_is_limited(code):
    output = run_python(code, seconds=30, memory=2**27)
    assert "MemoryError" in output and output.endswith("[out of memory: the code may use 128 MiB]\n")


def test_long_output_is_cut_with_its_end_left():
    output = run_python("print('x' * 5_000_000)\n1 / 0")
    assert MAX_CHARACTERS < len(output) < MAX_CHARACTERS + 100
    assert "\n[cut: of 5,000," in output and output.endswith("ZeroDivisionError: division by zero\n")
    wide = run_python("print('é' * 10_100 + 'z', end='')")
    assert wide.count("é") == MAX_CHARACTERS - 1 and "[cut: of 20,201 bytes" in wide and wide.endswith("z")
    assert run_python("print('é' * 10_000, end='')") == "é" * 10_000


def test_endless_output_is_stopped():
    output = run_python("while True: print('y' * 10_000)", seconds=60)
    assert len(output) < 11_000 and output.endswith("[stopped: it printed more than 32 MiB]\n")
    assert run_python("while True: print()", seconds=0.3).endswith("[stopped after 0.3 s]\n")


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import os\nos._exit(0)", "[the code ended its process with exit status 0]\n"),
        ("import sys\nprint(1)\nsys.exit(3)", "1\n[the code ended its process with exit status 3]\n"),
        ("import sys\nsys.exit('bye')", "bye\n[the code ended its process with exit status 1]\n"),
        ("import ctypes\nctypes.string_at(0)", "[the process of the code crashed or was killed: SIGSEGV]\n"),
        (
            "import signal\nsignal.alarm(1)\nwhile True: pass",
            "[the process of the code crashed or was killed: SIGALRM]\n",
        ),
    ],
)
def test_exits_and_crashes_are_named(code, output):
    assert run_python(code) == output


def test_abort_and_deep_stacks_are_crashes():
    assert "crashed or was killed: SIG" in run_python("import os\nos.abort()")
    deep = (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(self): return repr([self])\nA()"
    )
    assert "crashed or was killed: SIG" in run_python(deep, seconds=30)


def test_the_process_ends_with_its_parent():
    code = "from vlm_sapo.environments.sandbox import run_python\nrun_python('while 1: 0', seconds=60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: processes_of(parent.pid))
    parent.kill()
    parent.wait()
    wait_until(lambda: not processes_of(parent.pid))


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"code": b"1"}, "code (bytes) must be a str"),
        ({"seconds": 0}, "seconds (0) must be above 0"),
        ({"seconds": float("nan")}, "seconds (nan) must be above 0"),
        ({"memory": -1}, "memory (-1) must be a number of bytes"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError) as caught:
        run_python(**{"code": "1", **arguments})
    assert str(caught.value).startswith(text)


@pytest.fixture
def fresh_check():
    check_supported.cache_clear()
    yield
    check_supported.cache_clear()


def test_systems_without_a_lock_are_refused(monkeypatch, fresh_check):
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        with pytest.raises(
            ValueError, match="needs 64-bit Linux on x86_64 or aarch64, and this is linux on riscv64"
        ):
            run_python("1")
    monkeypatch.setitem(sandbox.SECCOMP_CALLS, platform.machine(), 100_000)  # no such call: ENOSYS
    with pytest.raises(ValueError, match="needs seccomp filters"):
        run_python("1")


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start; see that /bin/false runs"):
        run_python("1")
