"""Layers are enforced by the build: what a layer may not use, it cannot include.

Asks the compiler, with each layer's own command, which headers of the project it finds, and compares with the table below. Then a
forbidden include is compiled, which must fail, and an allowed one, which must not.

usage: check_layers.py SOURCE_FOLDER BUILD_FOLDER
"""
import json
import pathlib
import re
import shlex
import subprocess
import sys

PLAIN = {"core/kvm_api.h", "core/page.h", "player/tape.h", "recorder/kvm_calls.h", "recorder/kvm_ledger.h",
         "recorder/ledger.h", "recorder/partial_calls.h", "recorder/ram_ledger.h"}
# Layer: folders that it sees whole, and single headers.
MAY_SEE = {
    "player": ({"player"}, set()),
    "modules/played": ({"modules/played", "player"}, PLAIN),
    "recorder": ({"recorder", "player"}, PLAIN),
    "core": ({"core"}, set()),
    "image": ({"image", "core"}, set()),
    "tracer": ({"tracer", "core"}, PLAIN),
    "memory": ({"memory", "tracer", "image", "core"}, PLAIN),
    "modules": ({"modules", "memory", "tracer", "image", "core"}, PLAIN),
    # It copies the player's code.
    "restart": ({"restart", "player", "modules", "memory", "tracer", "image", "core"}, PLAIN),
    "supervisor": ({"supervisor", "restart", "modules", "memory", "tracer", "image", "core"}, PLAIN),
    "tools": ({"supervisor", "restart", "modules", "memory", "tracer", "image", "core"}, PLAIN),
}
FORBIDDEN, ALLOWED = ("tracer", "modules/kvm.h"), ("modules", "tracer/tape_draft.h")


def project_headers(source):
    headers = {str(path.relative_to(source / "src")) for pattern in ("*/*.h", "modules/played/*.h") for path in (source / "src").glob(pattern)}
    messages = {str(path.relative_to(source / "src").with_suffix(".pb.h")) for path in (source / "src").glob("*/*.proto")}
    return sorted(headers | messages)


def layer_of(source, file):
    folder = str(file.parent.relative_to(source)) if file.is_relative_to(source) else ""
    return folder.removeprefix("src/") if folder.startswith("src/") else folder


def commands_by_layer(source, build):
    """One compiler command for each set of include folders that a layer's sources are compiled with."""
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        layer = layer_of(source, (build / entry["file"]).resolve())
        if layer not in MAY_SEE:
            continue
        words = shlex.split(entry["command"])
        # The command without its file, output and dependency file.
        kept = [word for i, word in enumerate(words)
                if word not in ("-c", "-o", "-MD", "-MQ", "-MF", entry["file"]) and words[i - 1] not in ("-o", "-MQ", "-MF")]
        commands.setdefault(layer, {})[tuple(word for word in kept if word.startswith(("-I", "-i")))] = kept
    return {layer: list(variants.values()) for layer, variants in commands.items()}


def compile_text(command, build, text, *options):
    return subprocess.run([*command, *options, "-x", "c++", "-"], cwd=build, input=text, capture_output=True, text=True)


def visible(command, build, headers):
    text = "".join(f'#if __has_include("{header}")\nsees {header}\n#endif\n' for header in headers)
    done = compile_text(command, build, text, "-E", "-P")
    if done.returncode != 0:
        raise SystemExit(f"the preprocessor failed:\n{done.stderr}")
    return {match.group(1) for match in re.finditer(r"^sees (\S+)", done.stdout, re.M)}


def main():
    source, build = (pathlib.Path(folder).resolve() for folder in sys.argv[1:3])
    headers = project_headers(source)
    commands = commands_by_layer(source, build)
    failures = []
    for layer, (folders, single) in MAY_SEE.items():
        if layer not in commands:
            failures.append(f"no source of {layer} is compiled")
        expected = {header for header in headers if any(header.startswith(folder + "/") for folder in folders)} | single
        for command in commands.get(layer, []):
            seen = visible(command, build, headers)
            failures += [f"{layer} can include {header}, which lies in a layer that it may not use" for header in sorted(seen - expected)]
            failures += [f"{layer} cannot include {header}" for header in sorted(expected - seen)]
    for (layer, header), compiles in ((FORBIDDEN, False), (ALLOWED, True)):
        for command in commands.get(layer, []):
            done = compile_text(command, build, f'#include "{header}"\n', "-fsyntax-only")
            if (done.returncode == 0) != compiles:
                failures.append(f"{layer} with #include \"{header}\" {'does not compile' if compiles else 'compiles'}\n{done.stderr}")
    # The way around: relative to the including file.
    for path in sorted([*(source / "src").glob("*/*"), *(source / "src/modules/played").glob("*"), *(source / "tools").glob("*")]):
        if path.suffix in (".h", ".cc") and re.search(r'^\s*#\s*include\s*"\.\./', path.read_text(), re.M):
            failures.append(f"{path.relative_to(source)} includes a header by a path with ..")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
