#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Sums JUnit reports of all kinds of tests into one plain last line.

    sum-results.py NAME=STATUS=REPORT.xml ...

STATUS is the exit status of the step that wrote the report; REPORT.xml is empty for a step that writes none. A step
that failed without a failed test in its report (or without any report) counts as one failed test, so that nothing that
broke early can look like success.
"""

import collections
import sys
import xml.etree.ElementTree as ElementTree


def main():
    passed = failed = skipped = 0
    for argument in sys.argv[1:]:
        name, status, path = argument.split("=", 2)
        outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        reasons = collections.defaultdict(list)
        try:
            for case in ElementTree.parse(path).iter("testcase") if path else ():
                outcome, detail = outcome_of(case)
                outcomes[outcome] += 1
                if outcome == "failed":
                    print(f"failed: {name}: {case.get('name')}: {detail}")
                elif outcome == "skipped":
                    reasons[detail].append(case.get("name"))
        except (OSError, ElementTree.ParseError) as error:
            print(f"failed: {name}: no report of it: {error}")
            status = status if status != "0" else "1"
        for reason, tests in reasons.items():
            print(f"skipped: {name}: {len(tests)} because: {reason} (the first: {tests[0]})")
        if status != "0" and outcomes["failed"] == 0:
            print(f"failed: {name}: ended with status {status}")
            outcomes["failed"] += 1
        print(f"{name}: {outcomes['passed']} passed, {outcomes['failed']} failed, {outcomes['skipped']} skipped")
        passed += outcomes["passed"]
        failed += outcomes["failed"]
        skipped += outcomes["skipped"]
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed > 0 or passed == 0 else 0


def outcome_of(case):
    """What became of one test case, and why."""
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", first_line(child)
        if child.tag == "skipped":
            return "skipped", first_line(child)
    return "passed", ""


def first_line(element):
    text = element.get("message") or element.text or "no reason given"
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


if __name__ == "__main__":
    sys.exit(main())
