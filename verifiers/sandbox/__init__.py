"""Runs programs that a model wrote, and says whether they passed their tests.

    from verifiers.sandbox.pool import Program, Sandbox

    with Sandbox() as sandbox:
        result, = sandbox.run([Program("def f(x): return x + 1", tests="assert f(1) == 2", names=("f",))])
        result.passed

`pool` starts *workers* (`worker`). A worker locks itself in (`lock`) and forks a process for each program. Its `judge`,
a process of its own, runs the tests. They talk in plain data (`codec`).

Levels, strongest first: bubblewrap, landlock, rlimits. A level is in force or refused, never replaced by a weaker one.
`auto` takes bubblewrap if this machine has it, else landlock. Each of their workers proves its lock with a program that
tries it.

What is covered at every level:
- Forged verdicts. The tests never enter the program's process. In the judge the program's names stand for objects over
  there: a call goes out, plain data comes back, and the judge compares exact built-in types in its own memory. So exit
  codes, printed words, patched built-ins, an `__eq__` that is always true, and a search for the expected values get
  nowhere. The judge reports over a socket that the program does not have, with a secret drawn anew for each program.
  Tests draw random numbers from a seed that the program does not know.
- Time and size: wall and CPU time, address space, threads and processes (not as root at level `rlimits`), open files,
  bytes printed, one core. No bytes are written to files. The judge has the same address space and a second more.
- Leftovers. The program's process group is killed and reaped before the next program starts. A worker that is late
  costs its program, one that dies gives it a second run; both are replaced. Out of memory, Linux ends workers first.

Covered at `landlock` (Linux 5.13 with Landlock, libseccomp, packages landlockpy and pyseccomp):
- Files. Only the interpreter's library and installed packages can be read. Nothing can be written or locked.
- The rest of the machine. seccomp allows a list of system calls: no sockets but connected pairs, no descriptors sent,
  no new processes or programs, no signals, no other process's memory, no shared memory, no io_uring, nothing that later
  kernels add. As root, a worker first becomes a user of its own, who can only read the interpreter.
Covered at `bubblewrap` (the program `bwrap`, and all of `landlock`):
- Mount, PID, network, IPC and UTS namespaces (and user, except as root): other files and processes do not exist.

What is not covered at `rlimits` (any Unix, only by name; the one level of macOS):
- Hostile programs. They can do whatever you can. Use it for programs that you would run yourself.
Not covered at `landlock` and `rlimits`:
- Names. A program can learn whether a file exists, its size and times, and which process numbers are taken.
- An ordinary user's threads count together. A program with very many can keep the user's other programs from more.
Not covered at any level:
- Crowding. A right program can time out; a wrong one never passes. The wall time is enough for two busy programs per
  core. One that had little CPU time runs again, alone (`Sandbox.run`); what starves even then is judged too low.
- Holes in the kernel, and side channels (timing, caches). A virtual machine around the pool is stronger.
- Secrets in files that can be read, such as site-packages.
- The sum over workers: each may use `Limits.memory` twice, for the program and the judge.
- The tests themselves. They come with the data set and are trusted with the judge's process, under the same lock.
- What only an object's own process can tell. Arguments and results are copied: a test sees no change of an argument in
  place and no identity of a result. Plain data are the built-in types, Decimal, Fraction, naive dates and named tuples.
  Any other object equals only itself or, if both are dataclasses, one with equal fields. A test that asks whether it is
  true or calls its methods is told what the program likes. `in` compares its items here. Operators need two objects of
  the program: from `f(2) - 4` it would learn what is expected. Functions cannot be handed over.
- Time, entropy and addresses: programs that read them may not behave the same twice. `random`, `numpy.random` and
  `hash` start the same each time.
"""
