# SPDX-License-Identifier: Apache-2.0
"""A QEMU with the Linux guest of tests/guests/linux, run bare or under vmckpt, and the ways to talk to it."""

import collections
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import urllib.request

import pexpect
import pexpect.fdpexpect

from vmckpt_harness import ORDINARY_USER, REPOSITORY, ROOT, VMCKPT, descendants_of, signal_process, wait_until

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
GUEST_DIRECTORY = pathlib.Path(os.environ.get("VMCKPT_GUEST", REPOSITORY / "build" / "guest"))

# No step of a small TCG guest takes longer, unless it hangs; busy hosts are slow, so this is generous.
PATIENCE_S = 90

DISK_BYTES = 64 << 20

Tick = collections.namedtuple("Tick", "counter nonce monotonic_us realtime_us")


def build_guest():
    """Kernel and initramfs in GUEST_DIRECTORY; quick when they are up to date. VMCKPT_GUEST names one that is ready."""
    if "VMCKPT_GUEST" not in os.environ:
        run_guest_script("linux", GUEST_DIRECTORY)


def run_guest_script(kind, directory):
    script = REPOSITORY / "tests" / "guests" / kind / "build-guest.sh"
    subprocess.run([str(script), str(directory)], check=True, stdin=subprocess.DEVNULL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Guest:
    """One VM in one directory, over as many launches and restarts as a test likes.

    Its ticks are appended to DIRECTORY/ticks.log, so that the log of a VM that lives on is gapless: 1, 2, 3 ...
    """

    patience_s = PATIENCE_S

    def __init__(self, directory, *, user=None, processors=1, memory_mib=192, serial="socket", disks=False,
                 network=True, options=None, qemu_arguments=(), name="guest", drive_options=""):
        assert serial in ("socket", "terminal")
        self.directory = pathlib.Path(directory)
        self.user = user or (ROOT if os.getuid() == 0 else ORDINARY_USER)
        self.processors = processors
        self.memory_mib = memory_mib
        self.serial = serial
        self.disks = disks
        self.drive_options = drive_options
        self.network = network
        self.options = {"tick_ms": 20, **(options or {})}
        self.qemu_arguments = list(qemu_arguments)
        self.name = name
        self.http_port = free_port() if network else None
        self.echo_port = free_port() if network else None
        self.console = None
        self._foreground = None  # the bare QEMU, or the vmckpt above it
        self._foreground_is_vmckpt = False
        self._commands_run = 0
        if disks:
            self._make_disks()

    # ---- files ------------------------------------------------------------------------------------------------------

    @property
    def raw_disk(self):
        return self.directory / "disk.raw"

    @property
    def qcow2_disk(self):
        return self.directory / "disk.qcow2"

    @property
    def _tick_log(self):
        return self.directory / "ticks.log"

    @property
    def _output_log(self):
        return self.directory / "output.log"

    @property
    def _console_log(self):
        return self.directory / "console.log"

    def _make_disks(self):
        with open(self.raw_disk, "wb") as raw:
            raw.truncate(DISK_BYTES)
        run_checked(["mkfs.ext4", "-q", "-F", str(self.raw_disk)])
        run_checked(["qemu-img", "convert", "-O", "qcow2", str(self.raw_disk), str(self.qcow2_disk)])
        for disk in (self.raw_disk, self.qcow2_disk):
            os.chown(disk, self.user.uid, -1)

    # ---- starting and ending ----------------------------------------------------------------------------------------

    def qemu_command(self):
        options = ["console=ttyS0", "quiet", "panic=-1"] + [f"{key}={value}" for key, value in self.options.items()]
        command = [
            QEMU, "-nodefaults", "-no-reboot", "-display", "none",
            "-accel", "tcg,thread=multi", "-smp", str(self.processors), "-m", str(self.memory_mib),
            "-kernel", str(GUEST_DIRECTORY / "vmlinuz"), "-initrd", str(GUEST_DIRECTORY / "initramfs.cpio.gz"),
            "-append", " ".join(options),
            "-qmp", f"unix:{self.directory}/qmp.sock,server=on,wait=off",
            "-device", "virtio-serial-pci", "-chardev", f"file,id=tick,path={self._tick_log},append=on",
            "-device", "virtserialport,chardev=tick,name=tick",
            "-device", "virtio-rng-pci",
        ]
        if self.serial == "terminal":
            command += ["-serial", "mon:stdio"]
        else:
            command += ["-serial", f"unix:{self.directory}/serial.sock,server=on,wait=off"]
        if self.disks:
            command += ["-drive", f"file={self.raw_disk},if=virtio,format=raw{self.drive_options}",
                        "-drive", f"file={self.qcow2_disk},if=virtio,format=qcow2{self.drive_options}"]
        if self.network:
            forwarded = f"hostfwd=tcp:127.0.0.1:{self.http_port}-:80,hostfwd=tcp:127.0.0.1:{self.echo_port}-:7"
            command += ["-netdev", f"user,id=net,{forwarded}", "-device", "virtio-net-pci,netdev=net"]
        return command + self.qemu_arguments

    def start_bare(self):
        self._start(self.qemu_command(), is_vmckpt=False)
        self._connect_after_boot()

    def launch(self):
        self._start([VMCKPT, "launch", "-n", self.name, "-d", str(self.directory), "--", *self.qemu_command()],
                    is_vmckpt=True)
        self._connect_after_boot()

    def start_restart(self, image, *options):
        """Begins to restart in the foreground, as a user would."""
        self.ended()
        self._start([VMCKPT, "restart", *options, str(image), "-n", self.name], is_vmckpt=True)

    def restart(self, image, *options):
        """Restarts, connects the console anew, and returns the first tick of the new life."""
        seen_bytes = self._tick_log.stat().st_size
        self.start_restart(image, *options)
        first = self._wait_for_line_from(seen_bytes)
        self.connect_console()
        return first

    def _start(self, command, is_vmckpt):
        assert self._foreground is None, "it runs already"
        command = [*self.user.prefix, *command]
        environment = self.environment()
        if self.serial == "terminal":
            self._foreground = pexpect.spawn(command[0], command[1:], cwd=self.directory, env=environment,
                                             encoding="utf-8", codec_errors="replace", timeout=self.patience_s,
                                             dimensions=(24, 200))
            self._log_what_is_read(self._foreground)
        else:
            with open(self._output_log, "a", encoding="utf-8") as output:
                os.chown(self._output_log, self.user.uid, -1)  # a restart opens it again, as the user
                self._foreground = subprocess.Popen(command, cwd=self.directory, env=environment,
                                                    stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._foreground_is_vmckpt = is_vmckpt

    def environment(self):
        environment = dict(os.environ, VMCKPT_RUNTIME_DIR=str(self.directory / "run"), HOME=str(self.directory))
        environment.pop("XDG_RUNTIME_DIR", None)
        return environment

    def kill_9(self):
        """SIGKILL to QEMU itself. Returns when it, and the supervisor above it, are gone: the latter's status."""
        os.kill(self.pid(), signal.SIGKILL)
        return self.ended()

    def quit(self):
        """An orderly end, through QMP."""
        self.qmp("quit")
        return self.ended()

    def ended(self):
        """Waits until the foreground command has ended; its exit status, 128+N for a signal."""
        if self._foreground is None:
            return None
        foreground, self._foreground = self._foreground, None
        if self.serial == "terminal":
            foreground.expect(pexpect.EOF)
            foreground.wait()
            foreground.logfile_read.close()
            status = foreground.exitstatus if foreground.signalstatus is None else 128 + foreground.signalstatus
            foreground.close()
        else:
            status = foreground.wait(timeout=self.patience_s)
            status = status if status >= 0 else 128 - status
            if self.console is not None:
                self.console.logfile_read.close()
                os.close(self.console.fileno())
        self.console = None
        return status

    def destroy(self):
        """Ends what still runs, whatever state it is in."""
        if self._foreground is None:
            return
        for pid in descendants_of([self._foreground.pid]):
            signal_process(pid, signal.SIGKILL)
        self.ended()

    # ---- the vmckpt command -----------------------------------------------------------------------------------------

    def vmckpt(self, *arguments, check=True):
        """Runs a vmckpt command as the guest's user and returns the finished process."""
        command = [*self.user.prefix, VMCKPT, *map(str, arguments)]
        return run_checked(command, check=check, env=self.environment(), cwd=self.directory)

    def checkpoint(self, *arguments):
        """Checkpoints the guest; returns what the command reports as JSON, such as `image` and `pause_us`."""
        return json.loads(self.vmckpt("checkpoint", self.name, "--json", *arguments).stdout)

    def pid(self):
        """QEMU's process, as seen from here."""
        if not self._foreground_is_vmckpt:
            return self._foreground.pid
        targets = json.loads(self.vmckpt("list", "--json").stdout)
        for target in targets:
            if target["name"] == self.name:
                # 0 and -1 would make a kill() of it a kill of ourselves, or of everybody.
                assert target["pid"] > 1, f"vmckpt list says {target}"
                return target["pid"]
        raise LookupError(f"vmckpt list does not know {self.name}: {targets}")

    # ---- ticks ------------------------------------------------------------------------------------------------------

    def ticks(self):
        """All ticks of all lives of this guest, oldest first."""
        return parse_ticks(self._tick_log.read_bytes())

    def last_tick(self):
        return self.ticks()[-1]

    def wait_for_ticks(self, count):
        """Waits for `count` more ticks than there are now, and returns the last one."""
        wanted = len(self.ticks()) + count
        self._wait_until(lambda: len(self.ticks()) >= wanted, f"{count} more ticks")
        return self.last_tick()

    def _wait_for_line_from(self, offset_bytes):
        def first_tick():
            with open(self._tick_log, "rb") as log:
                log.seek(offset_bytes)
                return parse_ticks(log.read())
        return self._wait_until(first_tick, "a tick after the restart")[0]

    def _wait_until(self, condition, what):
        """Like wait_until, but does not wait for one that is dead, and says what was said last."""
        def condition_or_death():
            value = condition()
            if not value and self._foreground_has_ended():
                raise RuntimeError(f"ended while the test waited for {what}")
            return value
        try:
            return wait_until(condition_or_death, what, self.patience_s)
        except (AssertionError, RuntimeError) as error:
            tails = [f"the end of {log}: {log.read_text(encoding='utf-8', errors='replace')[-1000:]}"
                     for log in (self._output_log, self._console_log) if log.exists()]
            raise RuntimeError("; ".join([str(error), *tails])) from error

    def _foreground_has_ended(self):
        if self.serial == "terminal":
            return not self._foreground.isalive()
        return self._foreground.poll() is not None

    # ---- console ----------------------------------------------------------------------------------------------------

    def _connect_after_boot(self):
        self.connect_console()
        # The guest's first tick is its sign that all is up.
        self._wait_until(lambda: self._tick_log.exists() and self.ticks(), "the first tick")
        # Without echo the shell also leaves line editing alone, so all that comes is the output of commands.
        self.console_command("stty -echo")

    def connect_console(self):
        if self.serial == "terminal":
            self.console = self._foreground
        else:
            path = str(self.directory / "serial.sock")
            # QEMU listens again only when it has noticed that its old peer is gone, a moment after a restart.
            connection = self._wait_until(lambda: try_connect(path), f"a connection to {path}")
            self.console = pexpect.fdpexpect.fdspawn(connection.detach(), encoding="utf-8", codec_errors="replace",
                                                     timeout=self.patience_s)
            self._log_what_is_read(self.console)

    def _log_what_is_read(self, console):
        # For whoever looks into a failed test: a guest that panics says so here.
        console.logfile_read = open(self._console_log, "a", encoding="utf-8")

    def console_command(self, command, check=True):
        """Runs a command in the guest's shell and returns its output."""
        self._commands_run += 1
        done = f"done-{self._commands_run}-"
        self.console.sendline(f"{command}; echo {done}$?")
        self.console.expect(done + r"(\d+)\r*\n")
        status = int(self.console.match.group(1))
        output = re.sub(r"^(\s*guest# )*", "", self.console.before.replace("\r", "")).strip()
        if check and status != 0:
            raise RuntimeError(f"in the guest, \"{command}\" ended with {status}: {output}")
        return output

    # ---- QMP and network --------------------------------------------------------------------------------------------

    def qmp(self, command, **arguments):
        """One command over a QMP connection of its own."""
        path = str(self.directory / "qmp.sock")
        with self._wait_until(lambda: try_connect(path), f"a connection to {path}") as connection:
            connection.settimeout(self.patience_s)
            lines = connection.makefile("rb")
            assert "QMP" in json.loads(lines.readline())
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                connection.sendall(json.dumps(request).encode() + b"\n")
                reply = json.loads(lines.readline())
                while "event" in reply:
                    reply = json.loads(lines.readline())
                if "error" in reply:
                    raise RuntimeError(f"QMP {command}: {reply['error']['desc']}")
            return reply["return"]

    def http_tick(self):
        """The latest tick, asked of the guest's web server through a forwarded port: host to guest."""
        # The host's own proxy settings are not for this address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.http_port}/tick", timeout=self.patience_s) as answer:
            return parse_ticks(answer.read())[0]

    def connect_echo(self):
        """A TCP connection to the guest's echo service."""
        return socket.create_connection(("127.0.0.1", self.echo_port), timeout=self.patience_s)


def parse_ticks(log):
    """The ticks in a log. The line that is just being written is left out; any other line that is none is an error."""
    ticks = []
    for line in log.decode().split("\n")[:-1]:
        match = re.fullmatch(r"TICK (\d+) ([0-9a-f]{32}) (\d+) (\d+) *", line)
        assert match, f"not a tick line: {line!r}"
        ticks.append(Tick(int(match[1]), match[2], int(match[3]), int(match[4])))
    return ticks


def try_connect(path):
    """A connection to a Unix socket, or None while nobody listens."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        return connection
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None


def run_checked(command, check=True, **more):
    """Runs a command to its end, without input; where it fails, the error shows what it said."""
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                            timeout=300, **more)
    if check and result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stdout}{result.stderr}")
    return result
