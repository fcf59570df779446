"""Tasks are stopped, let go on and waited for by their owner alone, src/tracer/tracee.cc: looks for such calls elsewhere.

usage: check_ptrace.py src
"""
import pathlib
import re
import sys

OWNER = "tracer/tracee.cc"
REQUESTS = re.compile(r"\bPTRACE_(SEIZE|ATTACH|TRACEME|INTERRUPT|CONT|SYSCALL|SYSEMU|SINGLESTEP|LISTEN|DETACH|KILL)\b")
WAITS = re.compile(r"\b(waitpid|waitid|wait3|wait4|wait)\s*\((?!\s*\))")
SETS = re.compile(r"\bPTRACE_(SETREGS|SETREGSET|SETFPREGS|SETSIGMASK|POKEUSER|POKEDATA|POKETEXT|SETOPTIONS)\b")

MAY = {
    "tracer/thread_state.cc": ("sets registers, extended state and mask of a thread that stands", {SETS}),
    "supervisor/doctor_tracing.cc": ("asks what this host allows, with a child of its own", {REQUESTS, WAITS}),
    "supervisor/doctor_probes.cc": ("children of its own, not traced", {WAITS}),
    "supervisor/doctor_restart.cc": ("children of its own, not traced", {WAITS}),
    "supervisor/doctor_trial.cc": ("children of its own, not traced", {WAITS}),
    "supervisor/service.cc": ("reaps whatever has ended; stops that nobody has waited for go to release_late()", {WAITS}),
    "restart/new_process.cc": ("the starter and the namespace's init, not traced", {WAITS}),
    "modules/pidfd.cc": ("a process that stands for one that has ended, in the new process", {WAITS}),
    "modules/unix_names.cc": ("a child of its own, not traced", {WAITS}),
}


def without_comments(text):
    return re.sub(r"//[^\n]*", "", re.sub(r'"(\\.|[^"\\\n])*"', '""', text))


def main():
    source = pathlib.Path(sys.argv[1])
    failures, used = [], set()
    for path in sorted([*source.rglob("*.cc"), *source.rglob("*.h")]):
        name = path.relative_to(source).as_posix()
        if name == OWNER:
            continue
        for number, line in enumerate(without_comments(path.read_text()).splitlines(), 1):
            for kind in (REQUESTS, WAITS, SETS):
                found = re.search(r"::\s*" + kind.pattern, line) if kind is WAITS else kind.search(line)
                if not found:
                    continue
                used.add((name, kind))
                if kind not in MAY.get(name, ("", set()))[1]:
                    failures.append(f"src/{name}:{number}: {found.group(0)} belongs into {OWNER}: {line.strip()}")
    for name, (_, kinds) in MAY.items():
        failures += [f"src/{name} makes no such call any more: take it out of the list" for kind in kinds if (name, kind) not in used]
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
