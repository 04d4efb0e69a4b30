"""Programs that try to pass without solving, to leak, to stall or to stay. Each is text: (name, mode, what, program).

Mode "main": a script judged by its output. Mode "serve": a module whose function f is asserted. Words in @...@ are
filled in by test_sandbox.py: SECRET_FILE (a readable file outside), OUTSIDE (a writable folder outside), PARENT (the
scorer's process id), PORT (a listening TCP and UDP port), SOCKET (a listening Unix socket), ABSTRACT (an abstract
one), MARK (words to look for in command lines), REPOSITORY.
"""

# ruff: noqa: E501  (programs)

SLEEP = "import time; time.sleep(600)"

HOSTILE = [
    # --- passing without solving
    ("exit-early", "serve", "os._exit(0) while loading, so that no assertion runs", "import os; os._exit(0)"),
    ("exit-in-call", "serve", "os._exit(0) in the call", "import os\ndef f(x): os._exit(0)"),
    ("exit-as-the-checker", "serve", "ends with the checker's status for a pass", "import os\ndef f(x): os._exit(80)"),
    ("system-exit", "serve", "sys.exit(0) in the call", "import sys\ndef f(x): sys.exit(0)"),
    (
        "atexit",
        "serve",
        "writes a reply at exit",
        "import atexit, os\natexit.register(lambda: os.write(6, b'1\\nT'))\ndef f(x): raise SystemExit(80)",
    ),
    (
        "equals-everything",
        "serve",
        "returns an object that equals everything",
        "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
        "    def __bool__(s): return True\n    __hash__ = None\ndef f(x): return E()",
    ),
    (
        "equal-subclass",
        "serve",
        "returns a str whose comparison is always true",
        "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return E('a')",
    ),
    (
        "asks-the-test",
        "serve",
        "sends the test's process requests of its own: to evaluate, to read a field, to call what it never lent",
        "import os, __main__ as m\ndef f(x):\n    for q in (('run', 'hidden', (), {}, False), ('name', 'statements'), "
        "('get', 0, '__globals__'), ('callback', 0, (), {}), ('callback', -1, (), {})):\n"
        "        frame = m.encode(('request', *q)); os.write(6, str(len(frame)).encode() + b'\\n' + frame)\n"
        "        print(os.read(5, 4096))\n    return 0",
    ),
    (
        "builds-what-it-may-not",
        "serve",
        "sends a value that would be rebuilt by calling something else than a value type",
        "import os, __main__ as m\ndef f(x):\n    parts = m.encode('os.system') + m.encode('echo escaped')\n"
        "    frame = b't%d:' % (len(body := m.encode('reply') + b'T' + m.framed(b'V', parts))) + body\n"
        "    os.write(6, str(len(frame)).encode() + b'\\n' + frame)",
    ),
    (
        "odd-named-tuple",
        "serve",
        "sends a named tuple whose field is source text",
        "import os, __main__ as m\ndef f(x):\n    parts = m.encode('namedtuple') + m.encode('P') + "
        "m.encode(['x=__import__(\"os\")._exit(80)']) + m.encode([1])\n"
        "    body = m.encode('reply') + b'T' + m.framed(b't', m.framed(b'V', parts))\n"
        "    frame = m.framed(b't', body); os.write(6, str(len(frame)).encode() + b'\\n' + frame)",
    ),
    (
        "asks-without-end",
        "serve",
        "never replies, but asks for ever",
        "import os, __main__ as m\ndef f(x):\n    frame = m.encode(('request', 'callback', 0, (), {}))\n"
        "    while True: os.write(6, str(len(frame)).encode() + b'\\n' + frame); os.read(5, 4096)",
    ),
    (
        "lends-an-object",
        "serve",
        "lends an object where the test expects a text, and answers everything with True",
        "class E:\n    def __getattr__(s, n): return lambda *a, **k: True\n    def __eq__(s, o): return True\n"
        "    __hash__ = object.__hash__\ndef f(x): return E()",
    ),
    (
        "endless-generator",
        "serve",
        "returns a generator that equals everything and never ends",
        "class G:\n    def __iter__(s): return s\n    def __next__(s): return s\n    def __eq__(s, o): return True\n"
        "    def __ne__(s, o): return False\n    __hash__ = None\ndef f(x): return G()",
    ),
    (
        "equal-subclass-of-int",
        "serve",
        "returns an int with its own comparison, format and class",
        "class E(int):\n    def __eq__(s, o): return True\n    def __format__(s, k): return '0'\n"
        "    __class__ = str\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    ),
    (
        "patched-builtins",
        "serve",
        "overwrites what an assertion could use",
        "import builtins\nfor n in ('len','abs','all','any','sorted','eval','exec','isinstance','compile'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\nbuiltins.AssertionError = type('A', (), {})\n"
        "def f(x): return True",
    ),
    (
        "patched-runner",
        "serve",
        "overwrites the functions of the code that called it",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    g = frame.f_globals\n"
        "    for n in ('encode', 'check', 'serve', 'main', 'decode'):\n"
        "        if n in g: g[n] = lambda *a, **k: b'T'\n"
        "    for n in ('PASSED', 'WRONG', 'RAISED', 'GONE'):\n        g[n] = 80\n    frame = frame.f_back\n"
        "def f(x): return 0",
    ),
    (
        "forged-replies",
        "serve",
        "writes replies on every descriptor ahead of being asked",
        "import os\nfor d in range(64):\n    for m in (b'7\\nt5:TT', b'4\\nt2:TT', b'1\\nT', b'passed\\n', "
        "b'{\"passed\": true}\\n'):\n        try: os.write(d, m)\n        except OSError: pass\ndef f(x): return 0",
    ),
    (
        "broken-reply",
        "serve",
        "replies with a length that is none, then closes the pipe",
        "import os\ndef f(x):\n    os.write(6, b'-1\\n'); os.close(6); os.close(5)",
    ),
    (
        "deep-reply",
        "serve",
        "replies with bytes nested beyond all limits",
        "import os\ndef f(x):\n    body = b'c' * 3000000\n    m = str(len(body)).encode() + b'\\n' + body\n"
        "    while m: m = m[os.write(6, m):]\n    os._exit(0)",
    ),
    (
        "endless-reply",
        "serve",
        "replies with a length of a gigabyte",
        "import os\ndef f(x):\n    os.write(6, b'999999999\\n')\n    while True: os.write(6, b'x' * 65536)",
    ),
    (
        "raises-assertion-error",
        "serve",
        "raises exceptions with odd names",
        "class SystemExit(Exception): pass\ndef f(x): raise SystemExit(0)",
    ),
    (
        "frames",
        "serve",
        "prints every local of every frame and every string that gc knows",
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        print(frame.f_locals, frame.f_globals); frame = frame.f_back\n"
        "    for o in gc.get_objects(): print(repr(o)[:2000])\n    return 0",
    ),
    (
        "reads-descriptors",
        "serve",
        "reads all that can be read on every open descriptor",
        "import os\nfor d in range(64):\n    try:\n        os.set_blocking(d, False); print(d, os.pread(d, 1 << 20, 0))\n"
        "    except OSError:\n        try: print(d, os.read(d, 1 << 20))\n        except OSError: pass\ndef f(x): return 0",
    ),
    (
        "own-memory",
        "main",
        "looks for the expected output in its own arguments, environment and memory",
        "import sys, os, ctypes\nprint(sys.orig_argv, os.environ)\n"
        "print(open('/proc/self/environ').read(), open('/proc/self/maps').read())",
    ),
    # --- leaking and writing outside
    ("secret-file", "main", "reads a file outside by its path", "print(open('@SECRET_FILE@').read())"),
    (
        "walk",
        "main",
        "reads every small file outside the system's folders",
        "import os\nfor top, dirs, files in os.walk('/'):\n    dirs[:] = [d for d in dirs if not d.startswith('python')"
        " and top not in ('/usr/lib', '/lib', '/lib64')]\n    for name in files:\n"
        "        try: print(top, name, open(os.path.join(top, name), errors='replace').read(3000)[-500:])\n"
        "        except OSError: pass",
    ),
    (
        "homes",
        "main",
        "lists the folders of users, of the system and of the repository",
        "import os\nfor p in ('/home', '/root', '/work', '/tmp', '/var', '/etc', '/run', '/mnt', '@REPOSITORY@', "
        "'@OUTSIDE@'):\n    try: print(p, os.listdir(p))\n    except OSError as e: print(p, e)\n"
        "print(open('@REPOSITORY@/pyproject.toml').read())",
    ),
    (
        "environment-of-others",
        "main",
        "reads the environment and memory of other processes",
        "import os\nfor p in [*map(str, range(1, 40)), '@PARENT@', 'self', 'thread-self']:\n"
        "    for n in ('environ', 'cmdline', 'mem', 'maps', 'root', 'cwd'):\n"
        "        try: print(open(f'/proc/{p}/{n}', 'rb').read())\n        except OSError: pass",
    ),
    (
        "symlinks",
        "main",
        "reaches out through links in its own folder",
        "import os\nfor n, t in enumerate(('@SECRET_FILE@', '/proc/1/root', '/proc/self/root@SECRET_FILE@', "
        "'../../../../..@SECRET_FILE@')):\n    os.symlink(t, f'l{n}')\n"
        "    try: print(open(f'l{n}').read())\n    except OSError as e: print(e)\nos.link('@SECRET_FILE@', 'hard')",
    ),
    (
        "writes-outside",
        "main",
        "writes wherever it can",
        "import os, sys\nfor p in ('@OUTSIDE@', '/', '/usr/lib', '/lib', '/etc', '/dev', '/dev/shm', '/var/tmp', "
        "os.path.dirname(os.__file__), os.path.dirname(sys.executable)):\n"
        "    try: open(p + '/megatron_r1_hostile', 'w').write('here'); print('WROTE', p)\n"
        "    except OSError as e: print(p, e)",
    ),
    (
        "chroot-out",
        "main",
        "breaks out of the root folder by chroot",
        "import os\nos.mkdir('d'); os.chroot('d')\nfor _ in range(50): os.chdir('..')\nos.chroot('.')\n"
        "print(open('@SECRET_FILE@').read())",
    ),
    (
        "mounts",
        "main",
        "mounts, moves and unmounts; enters namespaces",
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "for flags in (0x10000000, 0x10020000, 0x20000, 0x40000000): print(c.unshare(flags))\n"
        "print(c.umount2(b'/', 2), c.mount(b'/', b'/tmp', None, 4096, None), c.mount(b'proc', b'/tmp', b'proc', 0, None),"
        " c.setns(0, 0), c.syscall(56, 0x10000011, 0, 0, 0, 0))\n"
        "assert c.unshare(0x10000000) == 0\nprint(open('@SECRET_FILE@').read())",
    ),
    (
        "regains-root",
        "main",
        "changes its user and raises its limits",
        "import os, resource\ndone = []\nfor act in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), "
        "lambda: os.setgroups([0]), lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),\n"
        "    lambda: resource.setrlimit(resource.RLIMIT_CPU, (600, 600)), "
        "lambda: resource.prlimit(@PARENT@, resource.RLIMIT_CPU, (1, 1))):\n"
        "    try: act(); done.append(act.__code__.co_firstlineno)\n    except (OSError, ValueError): pass\n"
        "print('ESCAPED' if done else 'held', done)",
    ),
    (
        "ptrace",
        "main",
        "traces and reads the scorer and its first process",
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nb = ctypes.create_string_buffer(64)\n"
        "class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('l', ctypes.c_size_t)]\n"
        "v = V(ctypes.addressof(b), 64)\nfor p in (1, 2, @PARENT@):\n"
        "    if c.ptrace(16, p, 0, 0) == 0 or c.process_vm_readv(p, ctypes.byref(v), 1, ctypes.byref(v), 1, 0) > 0:\n"
        "        print('ESCAPED', p)\nassert False",
    ),
    (
        "kills-others",
        "main",
        "kills every process that it can see",
        "import os, signal\nfor p in (@PARENT@, os.getppid(), -1):\n"
        "    try: os.kill(p, signal.SIGKILL)\n    except OSError as e: print(e)\nraise SystemExit(3)",
    ),
    (
        "devices",
        "main",
        "opens memory and disks, and makes device files",
        "import os, stat\nfor d in ('/dev/mem', '/dev/kmem', '/dev/port', '/dev/kmsg', '/dev/vda', '/dev/sda', "
        "'/dev/ptmx', '/dev/tty', '/dev/fuse', '/dev/kvm', '/dev/nvidia0'):\n"
        "    try: os.open(d, os.O_RDWR); print('ESCAPED', d)\n    except OSError: pass\n"
        "os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))\nprint('ESCAPED mknod')",
    ),
    (
        "tcp",
        "main",
        "connects to a listener on this machine",
        "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 1).send(b'ESCAPED')\nprint('ESCAPED')",
    ),
    (
        "udp",
        "main",
        "sends a datagram",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'ESCAPED', ('127.0.0.1', @PORT@))\n"
        "print('ESCAPED')",
    ),
    (
        "dns",
        "main",
        "resolves names and reaches a public address",
        "import socket\ntry: print('ESCAPED', socket.gethostbyname('example.com'))\nexcept OSError as e: print(e)\n"
        "socket.create_connection(('1.1.1.1', 53), 1)\nprint('ESCAPED')",
    ),
    (
        "unix-socket",
        "main",
        "connects to Unix sockets, by path and abstract",
        "import socket\nfor a in ('@SOCKET@', '\\0@ABSTRACT@'):\n    try:\n        s = socket.socket(socket.AF_UNIX)\n"
        "        s.connect(a); s.send(b'ESCAPED'); print('ESCAPED')\n    except OSError as e: print(e)\nassert False",
    ),
    (
        "keyrings",
        "main",
        "leaves a key for the next program, and a shared memory segment",
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "print('ESCAPED' if c.syscall(248, b'user', b'm', b'x', 1, -4) > 0 else 'held',\n"
        "      'ESCAPED' if c.shmget(77, 4096, 0o1666) >= 0 else 'held',"
        " 'ESCAPED' if c.msgget(77, 0o1666) >= 0 else 'held')",
    ),
    (
        "interpreter-files",
        "main",
        "overwrites the modules of the interpreter for the next program",
        "import os, heapq\nopen(heapq.__file__, 'a').write('\\nraise SystemExit')\nprint('ESCAPED')",
    ),
    (
        "runs-programs",
        "main",
        "starts a shell, and whatever executable it finds",
        "import os, subprocess\nfor c in ('/bin/sh', '/usr/bin/env', '/bin/su', '/usr/bin/sudo', '/usr/bin/bwrap'):\n"
        "    try: subprocess.run([c], check=True); print('ESCAPED')\n    except OSError as e: print(e)\n"
        "open('x', 'w').write('#!x'); os.chmod('x', 0o4755); os.execv('./x', ['x'])",
    ),
    # --- stalling, flooding, staying
    ("sleeps", "main", "sleeps", SLEEP),
    ("spins", "main", "computes for ever", "while True: pass"),
    (
        "ignores-signals",
        "main",
        "ignores every signal that can be ignored",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
    ),
    (
        "child-stays",
        "main",
        "leaves a child of its own session behind, with the output open",
        "import os, time, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(600) # @MARK@'])\n"
        "    os._exit(0)\ntime.sleep(0.05)",
    ),
    (
        "survives-the-launcher",
        "main",
        "gives up dying with its parent, then stays",
        "import ctypes, os\nc = ctypes.CDLL(None)\nprint('ESCAPED' if c.prctl(1, 0, 0, 0, 0) == 0 else 'held')\n"
        "os.close(1); os.close(2); import time; time.sleep(600)",
    ),
    ("fork-bomb", "main", "forks for ever", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    (
        "fork-and-exec-bomb",
        "main",
        "forks children that fork and sleep",
        "import os, time\nfor _ in range(1000):\n    if os.fork() == 0: os.fork(); time.sleep(600)",
    ),
    (
        "thread-bomb",
        "main",
        "starts threads without end",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
    ),
    ("memory", "main", "allocates without end", "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    ("mmap-bomb", "main", "maps 64 GiB", "import mmap\nm = mmap.mmap(-1, 64 << 30)\nm[0] = 1\nprint('ESCAPED')"),
    (
        "memory-files",
        "main",
        "hides memory in files without a name",
        "import os\nd = os.memfd_create('x'); os.ftruncate(d, 8 << 30); print('ESCAPED')",
    ),
    ("big-power", "main", "computes and prints 10 ** 10 ** 9", "print(10 ** 10 ** 9)"),
    ("big-integer", "serve", "returns an integer of 60 million digits", "def f(x): return 1 << 200_000_000"),
    ("big-list", "serve", "returns a list of a hundred million numbers", "def f(x): return iter(range(10 ** 8))"),
    (
        "deep-list",
        "serve",
        "returns nested lists",
        "def f(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r",
    ),
    (
        "own-list",
        "serve",
        "returns a list that contains itself",
        "def f(x):\n    r = []\n    r.append(r)\n    return r",
    ),
    (
        "recursion",
        "main",
        "recurses until the stack ends",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(): return [g() for _ in range(1)]\ng()",
    ),
    ("floods-stdout", "main", "prints without end", "while True: print('x' * 10000)"),
    ("floods-stderr", "main", "prints errors without end", "import sys\nwhile True: sys.stderr.write('x' * 10000)"),
    (
        "odd-output",
        "main",
        "prints bytes that are no text, terminal commands and overlong lines",
        "import os\nos.write(1, bytes(range(256)) * 100 + b'\\x1b[2J\\x1b]0;x\\x07' + '\\u202e\\ufdfa'.encode() * 9999)",
    ),
    (
        "zip-bomb",
        "main",
        "unpacks ten gigabytes from a small text",
        "import zlib\nc = zlib.compressobj(9)\ns = b''.join(c.compress(bytes(1 << 20)) for _ in range(64)) + c.flush()\n"
        "for _ in range(200):\n    x = x + zlib.decompress(s) if _ else zlib.decompress(s)",
    ),
    (
        "fills-the-folder",
        "main",
        "writes files until the disk is full",
        "import os\nn = 0\ntry:\n    while True:\n        with open(f'f{n}', 'wb') as h: h.write(bytes(1 << 20))\n"
        "        n += 1\nexcept OSError as e: print(n, e)\nprint('ESCAPED' if n > 16 else 'held')",
    ),
    (
        "files-without-end",
        "main",
        "makes empty files and open descriptors without end",
        "n = 0\nh = []\ntry:\n    while n < 10 ** 6:\n        open(f'{n}', 'w').close(); n += 1\nexcept OSError: pass\n"
        "try:\n    while True: h.append(open('/dev/null'))\nexcept OSError: pass\n"
        "print('ESCAPED' if n > 1100 or len(h) > 64 else 'held')",
    ),
    (
        "closes-everything",
        "main",
        "closes its descriptors and stays",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(600)",
    ),
    (
        "stops-itself",
        "main",
        "stops itself, so that it never ends",
        "import os, signal\nos.kill(0, signal.SIGSTOP)\n" + SLEEP,
    ),
    ("syntax-bomb", "main", "a source that nests too deeply to be compiled", "x = " + "(" * 5000 + ")" * 5000),
]

HONEST = [
    ("sum", "print(sum(map(int, input().split())))", "3 4 5\n", "12\n"),
    (
        "fast-reading",
        "import sys\ndata = sys.stdin.buffer.read().split()\nsys.stdout.write(str(sum(map(int, data))) + '\\n')",
        " ".join(map(str, range(50_000))) + "\n",
        "1249975000\n",
    ),
    (
        "recursion",
        "import sys\nsys.setrecursionlimit(10 ** 6)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\nprint(g(50_000))",
        "",
        "50000",
    ),
    (
        "heapq",
        "import heapq\nh = list(map(int, input().split()))\nheapq.heapify(h)\nprint(heapq.heappop(h))",
        "5 2 9",
        "2\n",
    ),
    ("big-integers", "print(3 ** 20_000 % 10 ** 30, len(str(3 ** 20_000)))", "", f"{pow(3, 20_000, 10**30)} 9543"),
    ("all-of-stdin", "import sys\nprint(len(sys.stdin.read().splitlines()))", "a\nb\nc\n", "3"),
    ("lines-of-stdin", "import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n", "ba\ndc\n"),
    (
        "classes",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n    y: 'int'\nprint(P(1, 2))",
        "",
        "P(x=1, y=2)",
    ),
    ("main", "def main():\n    print(int(input()) * 2)\nif __name__ == '__main__':\n    main()", "21\n", "42  \n\n"),
    ("floats", "print(sum([0.1] * 3), 1e300 * 1e10)", "", "0.30000000000000004 inf"),
    ("unicode", "print(input()[::-1], 'ß'.upper())", "añ漢\n", "漢ña SS"),
    ("exits", "import sys\nprint('yes')\nexit()\nprint('no')", "", "yes"),
    ("end-of-input", "n = 0\ntry:\n    while True: input(); n += 1\nexcept EOFError: print(n)", "1\n2\n", "2"),
    (
        "modules",
        "import math, itertools, collections, functools, bisect, re, string, random, decimal, fractions, json, datetime\n"
        "print(math.gcd(12, 18), collections.Counter('aab').most_common(1), decimal.Decimal('0.1') * 3)",
        "",
        "6 [('a', 2)] 0.3",
    ),
    (
        "threads",
        "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 26)\n"
        "t = threading.Thread(target=lambda: print('done'))\nt.start()\nt.join()",
        "",
        "done",
    ),
    ("files", "open('a.txt', 'w').write('kept')\nprint(open('a.txt').read())", "", "kept"),
    ("lots-of-output", "print('\\n'.join(map(str, range(50_000))))", "", "\n".join(map(str, range(50_000)))),
    ("processes", "import os\nif os.fork() == 0: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))", "", "7"),
]
