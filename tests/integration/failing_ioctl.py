#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""usage: failing_ioctl.py REQUEST COMMAND [ARG...]

Runs a command in which, and in whose children, one ioctl request fails with EIO: a seccomp filter of six instructions
(linux/filter.h, linux/seccomp.h). strace cannot do that where the command traces its children itself.
"""

import ctypes
import os
import struct
import sys

LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_OF_CALL, SECOND_ARGUMENT = 0, 24  # in struct seccomp_data
IOCTL = 16
EIO, ALLOW = 0x00050000 | 5, 0x7fff0000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def main():
    request, command = int(sys.argv[1], 0), sys.argv[2:]
    lines = [(LOAD, 0, 0, NUMBER_OF_CALL), (JUMP_IF_EQUAL, 0, 3, IOCTL),
             (LOAD, 0, 0, SECOND_ARGUMENT), (JUMP_IF_EQUAL, 0, 1, request),
             (RETURN, 0, 0, EIO), (RETURN, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    sock_fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, sock_fprog, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
