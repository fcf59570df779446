# SPDX-License-Identifier: Apache-2.0
"""Real programs: checkpointed in the middle of their work, killed with SIGKILL, restarted, and working on."""

import json
import os
import shutil
import sqlite3
import subprocess
import termios
import textwrap
import threading
import time

import pexpect
import pytest

from vmckpt_harness import VMCKPT, process_is_alive, signal_process, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

PYTHON = "/usr/bin/python3"


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def ask(stage, target, number):
    """The programs below answer a file ask-N with one line "answer-N JSON"; so output is only written when wanted."""
    stage.file(f"ask-{number}")
    line = target.wait_for_line(f"answer-{number} ")
    return json.loads(line.split(" ", 1)[1])


def kill_and_restart(target):
    image = target.checkpoint()
    target.kill()
    target.restart(image)


# ---- programs that compute -----------------------------------------------------------------------------------------

PYTHON_THREADS = """
    import json, os, queue, threading, time
    nonce = os.urandom(8).hex()
    counters = [0] * 5
    letters = queue.Queue()
    mail = {"sent": 0, "received": 0}
    stopping = threading.Event()

    def count(index):
        while not stopping.is_set():
            counters[index] += 1
            if counters[index] % 1000 == 0:
                time.sleep(0.0005)

    def send():
        while not stopping.wait(0.001):
            mail["sent"] += 1
            letters.put(mail["sent"])

    def receive():
        while (letter := letters.get()) is not None:
            mail["received"] += 1
            assert letter == mail["received"], "a letter is lost or doubled"

    threads = [threading.Thread(target=count, args=[i]) for i in range(len(counters))]
    threads += [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    print("READY", flush=True)
    number = 1
    while not os.path.exists("stop"):
        if os.path.exists(f"ask-{number}"):
            report = {"nonce": nonce, "counters": counters, "monotonic": time.monotonic(), "mail": mail}
            print(f"answer-{number}", json.dumps(report), flush=True)
            number += 1
        time.sleep(0.005)
    stopping.set()
    threads[-2].join()
    letters.put(None)
    for thread in threads:
        thread.join()
    assert mail["sent"] == mail["received"]
    raise SystemExit(9)
"""


def test_python_with_threads_goes_on_counting_under_its_old_nonce(stage):
    program = stage.file("threads.py", textwrap.dedent(PYTHON_THREADS))
    target = stage.launch([PYTHON, program])
    target.wait_for_line("READY")
    before = ask(stage, target, 1)
    for generation in (2, 3):
        kill_and_restart(target)
        after = ask(stage, target, generation)
        assert after["nonce"] == before["nonce"]
        assert after["monotonic"] >= before["monotonic"]
        assert all(now >= then for now, then in zip(after["counters"], before["counters"]))
        before = after
    for number in range(4, 100):  # whose turn it is, the interpreter decides
        later = ask(stage, target, number)
        if all(now > then for now, then in zip(later["counters"], before["counters"])):
            break
    assert all(now > then for now, then in zip(later["counters"], before["counters"]))
    assert later["mail"]["received"] > before["mail"]["received"]
    stage.file("stop")
    assert target.wait_for_end() == 9, target.report()


PERL_LOOP = r"""
    use strict; use warnings; $| = 1;
    my $nonce = join "", map { sprintf "%08x", rand(2**32) } 1 .. 4;
    my ($counter, $number, %seen) = (0, 1);
    print "READY\n";
    until (-e "stop") {
        $counter++;
        $seen{$counter % 1000} .= "x" if $counter < 1_000_000;
        next if $counter % 1000;
        select undef, undef, undef, 0.001;
        next unless -e "ask-$number";
        print qq(answer-$number {"nonce": "$nonce", "counter": $counter, "keys": ) . scalar(keys %seen) . "}\n";
        $number++;
    }
    exit 5;
"""


@needs("perl")
def test_perl_goes_on_counting_under_its_old_nonce(stage):
    program = stage.file("loop.pl", textwrap.dedent(PERL_LOOP))
    target = stage.launch(["perl", program])
    target.wait_for_line("READY")
    before = ask(stage, target, 1)
    for generation in (2, 3):
        kill_and_restart(target)
        after = ask(stage, target, generation)
        assert after["nonce"] == before["nonce"]
        assert after["counter"] > before["counter"]
        before = after
    stage.file("stop")
    assert target.wait_for_end() == 5, target.report()


@pytest.mark.parametrize("threads", [1, 8])
def test_a_multithreaded_program_under_load_keeps_every_chain_of_hashes_over_four_generations(stage, threads):
    target = stage.launch([stage.act("hash_chain"), stage.go_file, threads])
    target.wait_for_line("READY")
    for _ in range(4):
        time.sleep(0.05)  # some load between the checkpoints
        kill_and_restart(target)
    stage.go()
    target.wait_for_line("PASS", "FAIL")
    assert target.wait_for_end() == 0, target.report()


def generate_c_source(functions):
    """Enough work for a compiler, and nothing that it can throw away."""
    body = """
        double f{i}(double *a, int n) {{
            double s = {i};
            for (int i = 0; i < n; i++)
                for (int j = i; j < n; j++) s += a[(i * {i} + j) % n] * (s > {i}.5 ? a[j] : s / (j + 1));
            switch ((int)s % 7) {{
                case 0: return s + n; case 1: return s * 2; case 2: return s - {i};
                case 3: return f{previous}(a, n - 1); default: return -s;
            }}
        }}"""
    parts = ["double f0(double *a, int n) { return a[n - 1]; }"]
    parts += [textwrap.dedent(body.format(i=i, previous=i - 1)) for i in range(1, functions)]
    return "\n".join(parts) + "\n"


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@needs("gcc")
def test_a_compilation_in_the_middle_ends_with_the_same_output(stage):
    """--kill, because a compiler writes its output as it goes: file and image must be of the same moment."""
    compiler = subprocess.check_output(["gcc", "-print-prog-name=cc1"], text=True).strip()
    if not os.path.exists(compiler):
        pytest.skip("gcc has no cc1 program")
    source = stage.file("big.c", generate_c_source(60))
    compile_into = lambda output: [compiler, "-quiet", "-O2", "-g", source.name, "-o", output]
    begin = os.times()
    undisturbed = stage.run(compile_into("expected.s"))
    assert undisturbed.status == 0, undisturbed.stderr
    whole_s = os.times().children_user - begin.children_user

    target = stage.launch(compile_into("output.s"))
    pid = wait_until(lambda: stage.list() and target.pid, "the compiler is listed")
    wait_until(lambda: cpu_seconds(pid) > whole_s / 3, "a third of the work is done")
    image = target.checkpoint("--kill")
    assert target.wait_for_end() != 0  # it was killed, and says so
    target.restart(image)
    assert target.wait_for_end() == 0, target.report()
    # The name of the output is not in it.
    assert (stage.work / "output.s").read_bytes() == (stage.work / "expected.s").read_bytes()


# ---- servers and databases ------------------------------------------------------------------------------------------

class RedisWriters:
    """Clients that write as fast as they can, and remember what was acknowledged."""

    def __init__(self, connect, count=3):
        self.acknowledged = {}
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.write, args=[connect, i], daemon=True) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def write(self, connect, index):
        import redis

        number = 0
        client = connect()
        while not self.stopping.is_set():
            key, value = f"key:{index}:{number}", os.urandom(8).hex()
            try:
                client.set(key, value)
                client.incr(f"counter:{index}")
            except redis.ConnectionError:
                return  # the server was killed
            self.acknowledged[key] = value
            number += 1

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(timeout=20)


@needs("redis-server")
def test_redis_under_write_load_keeps_every_acknowledged_key(stage):
    redis = pytest.importorskip("redis")
    no_retry = pytest.importorskip("redis.retry").Retry(pytest.importorskip("redis.backoff").NoBackoff(), 0)
    path = str(stage.work / "redis.sock")
    target = stage.launch(["redis-server", "--port", "0", "--unixsocket", path, "--unixsocketperm", "777", "--save", "",
                           "--appendonly", "no", "--daemonize", "no", "--dir", stage.work])

    def connect():
        # By default, newer clients try for ten seconds to reach a server that has been killed.
        return redis.Redis(unix_socket_path=path, socket_timeout=10, retry=no_retry)

    def answers():
        try:
            return connect().ping()
        except redis.ConnectionError:
            return False

    wait_until(answers, lambda: f"redis answers; {target.report()}")
    writers = RedisWriters(connect)
    try:
        wait_until(lambda: len(writers.acknowledged) > 500, "some writes")
        for _ in range(2):
            acknowledged = dict(writers.acknowledged)
            image = target.checkpoint()
            before_kill = len(writers.acknowledged)
            wait_until(lambda: len(writers.acknowledged) > before_kill + 100, "writes go on after the checkpoint")
            target.kill()
            writers.stop()
            target.restart(image)
            wait_until(answers, lambda: f"redis answers after restart; {target.report()}")
            client = connect()
            for key, value in acknowledged.items():
                assert client.get(key) == value.encode(), f"{key} of {len(acknowledged)} keys; {target.report()}"
            writers = RedisWriters(connect)
            wait_until(lambda: len(writers.acknowledged) > 500, "new clients can write")
        assert client.bgsave()  # forks
        wait_until(lambda: client.info("persistence")["rdb_bgsave_in_progress"] == 0, "the saving child has ended")
        assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
        client.shutdown(nosave=True)
    finally:
        writers.stop()
    assert target.wait_for_end() == 0, target.report()


SQLITE_WRITER = """
    import os, sqlite3, sys, time
    database = sqlite3.connect("accounts.db", isolation_level=None, check_same_thread=False)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma wal_autocheckpoint=50")
    database.execute("create table if not exists entries (number integer primary key, amount integer, padding blob)")
    database.execute("create table if not exists total (sum integer)")
    database.execute("insert into total values (0)")
    print("READY", flush=True)
    number, asked = 0, 1
    while not os.path.exists("stop"):
        number += 1
        database.execute("begin immediate")
        database.execute("insert into entries values (?, ?, ?)", (number, number * 7 % 100, os.urandom(300)))
        database.execute("update total set sum = sum + ?", (number * 7 % 100,))
        database.execute("commit")
        if os.path.exists(f"ask-{asked}"):
            print(f"answer-{asked}", number, flush=True)
            asked += 1
    database.close()
"""


def check_database(stage, at_least):
    database = sqlite3.connect(stage.work / "accounts.db")
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    (count, last, amounts) = database.execute("select count(*), max(number), sum(amount) from entries").fetchone()
    assert count == last >= at_least, "a transaction is missing"
    assert database.execute("select sum from total").fetchone() == (amounts,)
    database.close()


def test_sqlite_under_write_load_is_consistent_with_its_files_of_the_same_moment(stage):
    program = stage.file("writer.py", textwrap.dedent(SQLITE_WRITER))
    target = stage.launch([PYTHON, program])
    target.wait_for_line("READY")
    written = ask(stage, target, 1)
    image = target.checkpoint("--kill")
    target.wait_for_end()
    files = [path for path in stage.work.iterdir() if path.name.startswith("accounts.db")]
    assert len(files) == 3  # with the write-ahead log and its shared index
    for path in files:
        shutil.copy2(path, stage.images / path.name)

    # It goes on for a while, and is lost.
    target.restart(image)
    copied_ns = (stage.images / "accounts.db").stat().st_mtime_ns
    wait_until(lambda: (stage.work / "accounts.db").stat().st_mtime_ns > copied_ns, "it writes on")
    target.kill()

    # The files of the checkpoint are put back, and with them the same image works again.
    for path in files:
        shutil.copy2(stage.images / path.name, path)
    target.restart(image)
    assert ask(stage, target, 2) > written
    stage.file("stop")
    assert target.wait_for_end() == 0, target.report()
    check_database(stage, written)


# ---- programs on a terminal ------------------------------------------------------------------------------------------

class TerminalProgram:
    """A program launched and restarted on terminals of their own."""

    def __init__(self, stage, words, name="target"):
        self.stage = stage
        self.name = name
        self.screen = stage.start_on_terminal([VMCKPT, "launch", "-n", name, "-d", stage.images, "--", *words])

    @property
    def pid(self):
        return next(entry["pid"] for entry in self.stage.list() if entry["name"] == self.name)

    def checkpoint(self):
        return self.stage.vmckpt_ok("checkpoint", self.name, "--json").json["image"]

    def kill(self):
        signal_process(self.pid, 9)
        self.screen.expect(pexpect.EOF)
        self.screen.wait()

    def restart(self, image, **size):
        self.screen = self.stage.start_on_terminal([VMCKPT, "restart", image, "-n", self.name], **size)

    def status(self):
        self.screen.expect(pexpect.EOF)
        self.screen.wait()
        return self.screen.exitstatus

    @property
    def is_raw(self):
        local_modes = termios.tcgetattr(self.screen.child_fd)[3]
        return not local_modes & (termios.ICANON | termios.ECHO)


@pytest.fixture
def shell(stage):
    program = TerminalProgram(stage, ["bash", "--noprofile", "--norc", "-i"])
    program.screen.sendline("PS1='read''y> '")
    program.screen.expect("ready> ")
    return program


def run_in(shell, line, expected=""):
    shell.screen.sendline(line)
    shell.screen.expect_exact(line)
    if expected:
        shell.screen.expect(expected)
    found = shell.screen.match
    shell.screen.expect("ready> ")
    return found


def test_bash_keeps_its_variables_and_functions_on_a_new_terminal(shell):
    secret = run_in(shell, "secret=$RANDOM$RANDOM; echo is:$secret:", r"is:(\d+):").group(1)
    run_in(shell, "twice() { echo $(( $1 * 2 )); }; cd /; trap 'echo trapped' USR1")
    image = shell.checkpoint()
    shell.kill()
    shell.restart(image, rows=30, columns=100)
    shell.screen.sendline("")
    shell.screen.expect("ready> ")
    run_in(shell, "echo is:$secret:", f"is:{secret}:")
    run_in(shell, "twice 21; pwd", r"42\r\n/\r\n")
    run_in(shell, "kill -USR1 $$", "trapped")
    # Right after a restart the size is another one for a moment, so that full-screen programs draw anew.
    wait_until(lambda: run_in(shell, "stty size", r"(\d+ \d+)\r\n").group(1) == "30 100", "the size of restart's terminal")
    run_in(shell, "(exit 3); echo $?; ls / | grep -c etc", r"3\r\n1\r\n")
    shell.screen.sendline("exit 7")
    assert shell.status() == 7


def test_job_control_works_in_a_restarted_bash(shell):
    run_in(shell, "sleep 1000 &", r"\[1\] \d+")
    run_in(shell, "kill %1; wait", "Terminated")
    image = shell.checkpoint()
    shell.kill()
    shell.restart(image)
    shell.screen.sendline("")
    shell.screen.expect("ready> ")
    shell.screen.sendline("sleep 1000; echo end of line")
    shell.screen.expect_exact("end of line\r\n")
    time.sleep(0.2)  # until sleep has the terminal; there is nothing to see
    shell.screen.sendcontrol("z")
    shell.screen.expect("Stopped")
    shell.screen.expect("ready> ")
    run_in(shell, "jobs", r"\[1\]\+ +Stopped +sleep 1000")
    shell.screen.sendline("fg")
    shell.screen.expect("sleep 1000")
    time.sleep(0.2)
    shell.screen.sendcontrol("c")
    shell.screen.expect("ready> ")
    run_in(shell, "sleep 0.01 & wait $!; echo over:$?", "over:0")
    shell.screen.sendline("exit 0")
    assert shell.status() == 0


def test_a_shell_with_a_stopped_job_is_refused_until_the_job_has_ended(stage, shell):
    shell.screen.sendline("sleep 1000")
    time.sleep(0.2)
    shell.screen.sendcontrol("z")
    shell.screen.expect("Stopped")
    shell.screen.expect("ready> ")
    refused = stage.vmckpt("checkpoint", "target")
    assert refused.status == 1
    assert "processes" in refused.stderr
    assert list(stage.images.iterdir()) == []
    run_in(shell, "jobs", "Stopped")
    run_in(shell, "kill -KILL %1; sleep 0.1", "Killed")
    assert os.path.exists(shell.checkpoint())
    shell.screen.sendline("exit 0")
    assert shell.status() == 0


@needs("less")
def test_less_redraws_its_screen_on_a_new_terminal_and_obeys_keys(stage):
    stage.file("numbers", "".join(f"line {i} of the file\n" for i in range(1, 1001)))
    program = TerminalProgram(stage, ["less", "numbers"])
    program.screen.expect("line 23 of the file")
    program.screen.send("/line 700\r")
    program.screen.expect("line 722 of the file")
    image = program.checkpoint()
    program.kill()
    program.restart(image, rows=40, columns=100)
    program.screen.expect("line 738 of the file")  # the whole new screen, without a key being pressed
    assert program.is_raw
    program.screen.send("g")
    program.screen.expect("line 1 of the file")
    program.screen.send("G")
    program.screen.expect("line 1000 of the file")
    program.screen.send("q")
    assert program.status() == 0


@needs("vim.tiny")
def test_vim_redraws_its_screen_on_a_new_terminal_and_keeps_unsaved_text(stage):
    text = stage.file("text", "old first line\nold second line\n")
    program = TerminalProgram(stage, ["vim.tiny", "-u", "NONE", "-i", "NONE", "-n", "text"])
    program.screen.expect("old second line")
    program.screen.send("onot saved before the checkpoint\x1b")
    program.screen.expect("not saved before")
    image = program.checkpoint()
    program.kill()
    assert text.read_text() == "old first line\nold second line\n"
    program.restart(image, rows=30, columns=90)
    program.screen.expect("not saved before the checkpoint")
    assert program.is_raw
    program.screen.send("Gotyped after restart\x1b:wq\r")
    assert program.status() == 0
    assert text.read_text().splitlines() == ["old first line", "not saved before the checkpoint", "old second line",
                                             "typed after restart"]
    assert not process_is_alive(program.screen.pid)
