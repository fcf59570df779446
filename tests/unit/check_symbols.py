"""The recorder needs only libc, the player nothing at all: compares undefined symbols with the lists below.

usage: check_symbols.py libvmckpt.so libplayer.a
"""
import subprocess
import sys

RECORDER_MAY_USE = {
    "__environ": "the environment, for exec wrappers",
    "environ": "the environment, for exec wrappers",
    "__errno_location": "errno",
    "dladdr": "its own path, for LD_PRELOAD",
    "dlsym": "the wrapped functions' real definitions",
    "memcpy": "plain copying",
    "memset": "plain filling",
    "strlen": "plain counting",
    "strcmp": "plain comparing",
    "__register_atfork": "a forked child has no other thread inside a ledger update",
    "__cxa_finalize": "weak: the linker's start files",
    "__gmon_start__": "weak: the linker's start files",
    "_ITM_deregisterTMCloneTable": "weak: the linker's start files",
    "_ITM_registerTMCloneTable": "weak: the linker's start files",
    "__rseq_offset": "weak: where glibc put each thread's rseq area",
    "__rseq_size": "weak: whether glibc registered it",
}
PLAYER_MAY_USE = {}
PLAYER_SECTION = "vmckpt_player"


def undefined(path, *options):
    lines = subprocess.run(["nm", "-u", *options, path], check=True, capture_output=True, text=True).stdout.splitlines()
    names = [line.split()[-1].split("@")[0] for line in lines if line.strip() and not line.endswith(":")]
    return set(names)


def defined(path):
    """What the members of an archive have for each other."""
    lines = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if len(line.split()) == 3}


def sections_with_content(path):
    text = subprocess.run(["objdump", "-h", path], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    return {row[1] for row in rows if int(row[2], 16) > 0}


def main():
    recorder, player = sys.argv[1:3]
    failures = []
    for path, allowed, options in ((recorder, RECORDER_MAY_USE, ["-D"]), (player, PLAYER_MAY_USE, [])):
        for name in sorted(undefined(path, *options) - set(allowed) - (defined(path) if path == player else set())):
            failures.append(f"{path} needs {name}, which is not allowed")
    # Code or constants outside the section would not be copied along with it.
    harmless = {PLAYER_SECTION, ".comment", ".note.gnu.property", ".note.GNU-stack", ".eh_frame", ".llvm_addrsig"}
    for name in sorted(sections_with_content(player) - harmless):
        if not name.startswith((".debug", ".rela", ".strtab", ".symtab", ".shstrtab")):
            failures.append(f"{player} has content in section {name}, outside {PLAYER_SECTION}")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
