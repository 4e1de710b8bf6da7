"""Programs that try to pass without solving the task, to get out, or to use up the machine.

The task is `f(x) == x * x`; none of the programs solves it. A program of LEAKS returns what it got hold of, "" if nothing.
"""

from __future__ import annotations

TESTS = "assert f(3) == 9\nassert f(-2) == 4\n"
SECRET = "hf_notforyou"

FORGERIES = {
    "returns none": "def f(x): return None",
    "exits with success": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "exits inside the function": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit in the function": "def f(x): raise SystemExit(0)",
    "prints success": "print('passed'); print('OK'); import sys; sys.stderr.write('passed')\ndef f(x): return 0",
    "prints a verdict": 'print(\'{"nonce": "", "status": "passed", "detail": ""}\')\ndef f(x): return 0',
    "raises AssertionError": "def f(x): raise AssertionError('passed')",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "equal to everything": "class A:\n  def __eq__(s, o): return True\n  def __hash__(s): return 9\ndef f(x): return A()",
    "number equal to everything": "class A(int):\n  def __eq__(s, o): return True\ndef f(x): return A(7)",
    "text equal to everything": "class A(str):\n  def __eq__(s, o): return True\ndef f(x): return A('')",
    "list equal to everything": "class A(list):\n  def __eq__(s, o): return True\ndef f(x): return A()",
    "true object": "class A:\n  def __bool__(s): return True\ndef f(x): return A()",
    "metaclass equal": "class M(type):\n  def __eq__(s, o): return True\n  __hash__ = type.__hash__\n"
    "class A(metaclass=M): pass\ndef f(x): return A",
    "patches builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.bool = lambda *a: True\n"
    "builtins.int.__eq__\ndef f(x): return 0",
    "patches json": "import json\njson.dumps = lambda *a, **k: '{\"value\": 9}'\ndef f(x): return 0",
    "patches the wire": "import sys\nfor m in list(sys.modules.values()):\n  if hasattr(m, 'encode'): m.encode = lambda *a: 9\n"
    "def f(x): return 0",
    "patches os.write": "import os\nw = os.write\nos.write = lambda fd, b: w(fd, b.replace(b'failed', b'passed'))\n"
    "def f(x): return 0",
    "patches os._exit": "import os\nos._exit = lambda c: None\ndef f(x): return 0",
    "replaces the tests' names": "assert_ = None\ndef f(x): return 0\nimport sys\nsys.modules['tests'] = sys.modules['program']",
    "walks the frames": "import sys\ndef f(x):\n  g = sys._getframe()\n  while g:\n"
    "    for k, v in g.f_locals.items():\n      if isinstance(v, list): v.append('passed')\n    g = g.f_back\n  return 0",
    "searches the heap for the tests": "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, str) and 'f(3)' in o]\n"
    "def f(x): return 9 if found else 0",
    "writes to every descriptor": 'import os\nfor fd in range(3, 64):\n  try: os.write(fd, b\'{"status": "passed"}\')\n'
    "  except OSError: pass\ndef f(x): return 0",
    "closes every descriptor": "import os\nos.closerange(0, 256)\ndef f(x): return 0",
    "answers garbage": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\\xff' * 64)\n  except OSError: pass\n"
    "def f(x): return 0",
    "answers a message of 2^60 bytes": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, (1 << 60).to_bytes(8, 'big'))\n"
    "  except OSError: pass\ndef f(x): return 0",
    "exit handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "excepthook": "import sys\nsys.excepthook = lambda *a: print('passed')\ndef f(x): return 1 / 0",
    "thread answers": "import threading, os\nthreading.Thread(target=lambda: os.write(1, b'passed'), daemon=True).start()\n"
    "def f(x): return 0",
    "trace function": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 0",
    "nested list bomb": "def f(x):\n  a = []\n  for _ in range(100000): a = [a]\n  return a",
    "cyclic list": "def f(x):\n  a = []; a.append(a); return a",
    "unhashable keys": "def f(x): return {'d': 1}, {frozenset(): []}",
    "huge number": "def f(x): return 10 ** 5_000_000",
    "huge text": "def f(x): return 'x' * (1 << 27)",
    "surrogates": "def f(x): return '\\ud800'",
    "syntax error": "def f(x) return x",
    "null bytes": "def f(x): return 0\0",
    "binary": "\x00\x01\x02\x7f",
    "no function": "g = 1",
    "empty": "",
}

EXHAUSTION = {
    "memory bomb": "x = bytearray(8 << 30)\ndef f(x): return 0",
    "memory bomb by pieces": "x = []\nwhile True: x.append(bytes(1 << 24))",
    "power bomb": "def f(x): return 9 ** 9 ** 9",
    "deep recursion": "def g(x): return g(x + 1)\ndef f(x): return g(x)",
    "deep recursion without a limit": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(x): return g(x + 1)\ndef f(x): return g(x)",
    "fork bomb": "import os\ndef f(x):\n  while True: os.fork()",
    "thread bomb": "import threading, time\ndef f(x):\n  while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "endless output": "while True: print('x' * 1000)",
    "endless output to stderr": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "big file": "def f(x):\n  with open('/tmp/a', 'wb') as file:\n    for _ in range(1000): file.write(bytes(1 << 20))\n  return 0",
    "many files": "def f(x):\n  for i in range(10 ** 6): open(f'/tmp/{i}', 'w').close()\n  return 0",
    "many descriptors": "def f(x):\n  keep = [open('/dev/null') for _ in range(10 ** 5)]\n  return 0",
    "endless loop": "def f(x):\n  while True: pass",
    "endless loop that ignores signals": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\ndef f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
    "endless regular expression": "import re\ndef f(x): return re.match('(a*)*b', 'a' * 40)",
    "endless sequence": "import itertools\ndef f(x): return itertools.count()",
    "sleep": "import time\ndef f(x): time.sleep(1000)",
    "sleep while loading": "import time\ntime.sleep(1000)",
    "stops itself": "import os, signal\ndef f(x): signal.pause()",
}
SLOW = (
    "sleep",
    "sleep while loading",
    "stops itself",
    "fork bomb",
    *(name for name in EXHAUSTION if "endless" in name),
)

LEAKS = {
    "environment": "import os\ndef f(x): return ''.join(os.environ.values())",
    "environment of the process": "def f(x): return open('/proc/self/environ').read()",
    "environment of the parent": "import os\ndef f(x): return open(f'/proc/{os.getppid()}/environ').read()",
    "environment by C": "import ctypes\ndef f(x):\n  g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p\n"
    "  return (g(b'HF_TOKEN') or b'').decode()",
    "command line": "import sys\ndef f(x): return ' '.join(sys.argv[1:])",
    "passwords": "def f(x): return open('/etc/passwd').read()",
    "home": "import os\ndef f(x): return ' '.join(os.listdir(os.path.expanduser('~root')))",
    "a file of the caller": "def f(x): return open(SECRET_FILE).read()",
    "a link to a file of the caller": "import os\ndef f(x):\n  os.symlink(SECRET_FILE, '/tmp/l'); return open('/tmp/l').read()",
    "up from here": "import os\ndef f(x):\n  os.chdir('../../../../..'); return ' '.join(set(os.listdir()) & {'etc', 'home', 'work', 'var'})",
    "out of the root": "import os\ndef f(x):\n  os.mkdir('/tmp/j'); os.chroot('/tmp/j'); return open('../../../etc/passwd').read()",
    "mount": "import ctypes\ndef f(x):\n  return 'mounted' if not ctypes.CDLL(None).mount(b'p', b'/tmp', b'proc', 0, 0) else ''",
    "remount": "import ctypes\ndef f(x):\n"
    "  return 'mounted' if not ctypes.CDLL(None).mount(None, b'/usr', None, 32 | 4096, None) else ''",
    "user namespace": "import ctypes\ndef f(x): return 'unshared' if not ctypes.CDLL(None).unshare(0x10000000) else ''",
    "becomes root": "import os\ndef f(x):\n  os.setuid(0); return 'root'",
    "writes Python": "import os\ndef f(x):\n  open(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w').write('x'); return 'written'",
    "writes the root": "def f(x):\n  open('/a', 'w').write('x'); return 'written'",
    "internet": "import socket\ndef f(x):\n  s = socket.create_connection(('1.1.1.1', 53), 0.5); return 'connected'",
    "loopback": "import socket\ndef f(x):\n  s = socket.socket(); s.bind(('127.0.0.1', 0)); return 'bound'",
    "name lookup": "import socket\ndef f(x): return socket.gethostbyname('localhost.example.org')",
    "unix socket": "import socket\ndef f(x):\n  s = socket.socket(socket.AF_UNIX); s.bind('\\0dare'); return 'bound'",
    "signal to the parent": "import os\ndef f(x):\n  os.kill(os.getppid(), 9); return 'killed'",
    "signal to everybody": "import os\ndef f(x):\n  os.kill(-1, 9); return 'killed'",
    "traces the parent": "import ctypes, os\ndef f(x):\n"
    "  return 'traced' if not ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) else ''",
    "site packages": "def f(x):\n  import pytest; return 'imported'",
    "the sandbox's own package": "import sys\nsys.modules.clear()\ndef f(x):\n  import dare.sandbox.run; return 'imported'",
    "device": "def f(x):\n  open('/dev/mem', 'rb').read(1); return 'read'",
    "set-uid shell": "import subprocess\ndef f(x): return subprocess.run(['su', '-c', 'id'], capture_output=True, text=True).stdout",
}

SURVIVORS = {
    "child": "import subprocess\ndef f(x):\n  subprocess.Popen(['sleep', MARK]); return 9",
    "daemon": "import os\ndef f(x):\n  if os.fork() == 0:\n    if os.fork() == 0:\n      os.execvp('sleep', ['sleep', MARK])\n"
    "    os._exit(0)\n  return 0",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x): return 0",
}
