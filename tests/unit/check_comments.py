"""Comments and documents name files that exist: looks for paths that are nowhere in the tree.

The end of a path is enough (`kvm.cc` for src/modules/kvm.cc). A header without a folder may be anybody's and is not looked for.
Files of others begin with a folder that has a row below. NAME in capitals stands for any name.

usage: check_comments.py SOURCE_FOLDER
"""
import pathlib
import re
import sys

PATH = re.compile(r"(?<![\w/.<$}*-])((?:[\w.-]+/)+[\w.-]+\.(?:cc|h|proto|py|inc|sh|md)|[\w-]+\.(?:cc|proto|py|inc|sh|md))"
                  r"(?![\w*/])")
COMMENT = {".cc": "//", ".h": "//", ".proto": "//", ".inc": "//", ".py": "#", ".sh": "#", ".build": "#"}
FOLDERS = ("src", "tools", "tests", "include", "scripts")

# First folders of paths in the trees of others, and what they are.
OTHERS = {
    "Documentation": "the kernel",
    "arch": "the kernel",
    "asm": "the kernel's headers",
    "drivers": "the kernel",
    "fs": "the kernel",
    "include": "the kernel's, unless it is include/vmckpt",
    "kernel": "the kernel",
    "linux": "the kernel's headers",
    "mm": "the kernel",
    "net": "the kernel",
    "netinet": "libc's headers",
    "sys": "libc's headers",
    "sysdeps": "glibc",
    "virt": "the kernel",
}


def comments_of(path):
    """(line number, text) of all comments; of a document, of all lines."""
    mark = COMMENT.get(path.suffix)
    quoted = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if mark is None:
            yield number, line
            continue
        if path.suffix == ".py":  # what stands in three quotes is prose too
            pieces = line.count('"""')
            if quoted or pieces:
                yield number, line
            if pieces == 1:
                quoted = not quoted
        if mark in line:
            yield number, line.split(mark, 1)[1]


def main():
    source = pathlib.Path(sys.argv[1]).resolve()
    mine = [path for folder in FOLDERS for path in (source / folder).rglob("*") if path.suffix in COMMENT and path.is_file()]
    mine = [path for path in mine if "layers" not in path.parts] + [source / "meson.build"]
    documents = [*source.glob("*.md"), *(source / "docs").glob("*.md"), *(source / "tests").rglob("*.md")]
    there = {path.relative_to(source).as_posix() for path in [*mine, *documents]}
    # What protoc makes of a schema.
    there |= {name.removesuffix(".proto") + ".pb.h" for name in there if name.endswith(".proto")}
    ends = {"/".join(name.split("/")[i:]) for name in there for i in range(name.count("/") + 1)}
    failures = []
    for path in sorted([*mine, *documents]):
        for number, text in comments_of(path):
            for match in PATH.finditer(text):
                name = match.group(1).removeprefix("./")
                if name in ends or "NAME." in name or (name.split("/")[0] in OTHERS and not name.startswith("include/vmckpt/")):
                    continue
                if (path.parent / name).is_file():  # relative to whoever names it
                    continue
                failures.append(f"{path.relative_to(source)}:{number}: there is no {name}: {text.strip()[:150]}")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
