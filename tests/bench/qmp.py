# SPDX-License-Identifier: Apache-2.0
"""A minimal QMP client: commands one at a time, events kept for whoever waits for them."""

import json
import socket
import time


class QmpError(Exception):
    pass


class Qmp:
    def __init__(self, path, timeout_s=120):
        """Connects to a QEMU that may still be starting: the socket may be missing or refuse for a while."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        self._timeout_s = timeout_s
        self._received = b""
        self._events = []
        self._next_message()  # the greeting
        self.call("qmp_capabilities")

    def close(self):
        self._socket.close()

    def call(self, command, **arguments):
        request = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._next_message()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def human(self, line):
        """A monitor command without a QMP twin (savevm); it prints nothing when it succeeds."""
        output = self.call("human-monitor-command", command_line=line).strip()
        if output:
            raise QmpError(f"{line}: {output}")

    def wait_event(self, wanted, timeout_s):
        """The first event for which `wanted` is true, or None if none comes in time; earlier ones are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self._events:
                event = self._events.pop(0)
                if wanted(event):
                    return event
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            try:
                message = self._next_message(remaining_s)
            except TimeoutError:
                return None
            if "event" in message:
                self._events.append(message)

    def forget_events(self):
        self._events.clear()

    def _next_message(self, timeout_s=None):
        self._socket.settimeout(timeout_s or self._timeout_s)
        while b"\n" not in self._received:
            chunk = self._socket.recv(65536)
            if not chunk:
                raise QmpError("QEMU closed its QMP socket")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)
