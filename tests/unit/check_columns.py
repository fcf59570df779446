#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""No line of the code is longer than .clang-format allows.

    check_columns.py SOURCE_ROOT
"""

import pathlib
import re
import sys

FOLDERS = ["include", "src", "tools", "tests/unit", "tests/guests", "tests/fuzz"]
ENDINGS = {".cc", ".h", ".c", ".inc"}


def main():
    root = pathlib.Path(sys.argv[1])
    limit = int(re.search(r"^ColumnLimit: (\d+)$", (root / ".clang-format").read_text(), re.MULTILINE)[1])
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in ENDINGS and not path.is_symlink()]
    assert len(files) > 200, f"only {len(files)} files below {root}: that cannot be all"
    failed = False
    for path in sorted(files):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > limit:
                print(f"{path.relative_to(root)}:{number}: {len(line)} columns, {limit} are allowed")
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
