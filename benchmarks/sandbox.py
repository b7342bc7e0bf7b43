"""Programs per second in the sandbox: HumanEval's reference solutions, isolated.

    python benchmarks/sandbox.py --data FOLDER

In the same rounds: plain unprotected processes, one for each program, and a fork server that does nothing but fork: no
lock, no limits, no judge, and its programs could forge any result. It shows what a process for each program costs by
itself; that none could be faster is not shown. The rates are those of `times` passes over all programs, for the plain
ones of one: with few passes the slowest program, near the end, leaves a core idle.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import measure  # first: puts the repository on the path
import tyro

from verifiers import BadInput, load_task
from verifiers.code_tasks import program_of
from verifiers.sandbox.pool import Sandbox
from verifiers.sandbox.worker import PRELOAD

BAR = 3.9  # isolated programs to plain ones
FORK_SERVER = """
import gc, json, os, sys
os.register_at_fork = lambda **_: None
tickets, modules, programs = int(sys.argv[1]), sys.argv[2].split(), json.load(sys.stdin)
for name in modules:
    __import__(name)
for _ in range(20):
    exec(compile("from typing import List\\ndef f(x: List[int]): return [x]", "p", "exec"), {})
gc.collect()
gc.freeze()
while ticket := os.read(tickets, 2):
    child = os.fork()
    if child == 0:
        exec(compile(programs[int.from_bytes(ticket, "big")], "p", "exec"), {"__name__": "program"})
        os._exit(0)
    os.write(1, b"1" if os.waitpid(child, 0)[1] else b"0")
"""


@dataclass
class Args:
    data: str | None = None
    """folder with HumanEval's rows; without it, the hub's"""
    rounds: int = 5
    """rounds of all three, after one that is not counted"""
    times: int = 10
    """how often all programs are run in a round"""


class ForkServers:
    """`count` processes that share the programs."""

    def __init__(self, programs: Sequence[str], count: int) -> None:
        theirs, self.tickets = os.pipe()
        self.answers, answer = os.pipe()
        command = [sys.executable, "-c", FORK_SERVER, str(theirs), " ".join(PRELOAD)]
        for _ in range(count):
            server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=answer, pass_fds=[theirs])
            server.stdin.write(json.dumps(programs).encode())
            server.stdin.close()
        os.close(theirs), os.close(answer)

    def run(self, indices: Sequence[int]) -> None:
        """Run these programs. Raises AssertionError if one fails."""
        os.write(self.tickets, b"".join(i.to_bytes(2, "big") for i in indices))
        left = len(indices)
        while left:
            answers = os.read(self.answers, left)
            assert answers and b"1" not in answers, "forked: a reference solution fails"
            left -= len(answers)


def main(args: Args) -> None:
    measure.describe_machine(1)
    problems = load_task("humaneval", args.data).test
    programs = [program_of(problem, problem.solution) for problem in problems]
    plain = [f"{program.source}\n{program.tests}" for program in programs]
    with Sandbox() as sandbox, ThreadPoolExecutor(sandbox.count) as threads:
        servers = ForkServers(plain, sandbox.count)

        def run_isolated() -> None:
            assert all(result.passed for result in sandbox.run(programs * args.times)), "isolated: a solution fails"

        def run_plain() -> None:
            commands = [[sys.executable, "-c", source] for source in plain]
            runs = threads.map(lambda command: subprocess.run(command, capture_output=True).returncode, commands)
            assert not any(runs), "plain: a solution fails"

        times = measure.interleaved({
            "isolated": run_isolated, "plain": run_plain,
            "forked": lambda: servers.run([*range(len(plain))] * args.times),
        }, args.rounds)  # fmt: skip
    print(f"{len(plain)} reference solutions, {sandbox.count} at once, level {sandbox.level}; median [quartiles]\n")
    each = {name: 1 if name == "plain" else args.times for name in times}
    rates = {name: [each[name] * len(plain) / t for t in values] for name, values in times.items()}
    ratios = {name: [a / b for a, b in zip(values, rates["plain"])] for name, values in rates.items()}
    measure.print_table(
        ["", "programs/s", "times plain"],
        [[name, measure.spread(rates[name], ".0f"), measure.spread(ratios[name], ".2f")] for name in rates],
    )
    print("isolated to plain:", measure.verdict(measure.quartiles(ratios["isolated"])[0], BAR, at_most=False))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except BadInput as error:
        sys.exit(f"error: {error}")
