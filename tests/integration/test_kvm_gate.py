# SPDX-License-Identifier: Apache-2.0
"""The gate at KVM_RUN (src/recorder/kvm_ledger.h) and VMMs of other habits than QEMU's: such as look at exit_reason after
EINTR, take EINTR for an error, lock themselves in, keep paused vCPUs in a signal handler, or were themselves stopped."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

from test_kvm_tiny import Vm, pytestmark as needs_kvm, needs_vmckpt, stage  # noqa: F401 (stage is a fixture)
from vmckpt_harness import VMCKPT, process_is_alive, wait_until

pytestmark = [*needs_kvm, needs_vmckpt]

CHECKPOINTS = int(os.environ.get("VMCKPT_TEST_GATE_CHECKPOINTS", "60"))


# Each EINTR that the checkpoint lets through is a doubled access here.
@pytest.mark.parametrize("vcpus", [1, 2])
def test_no_access_is_doubled_for_a_vmm_that_looks_at_the_exit_reason_whatever_kvm_run_says(stage, vcpus):
    vm = Vm(stage, "io_counter", f"--vcpus={vcpus}", "--reads-reason", "--eventfds", "--coalesced")
    for number in range(1, CHECKPOINTS + 1):
        if number % 20 == 0:
            vm.next_life()
            vm.expect_to_run()
        else:
            vm.target.checkpoint().unlink()
            vm.expect_no_complaint()
    vm.expect_to_run()
    vm.finish()


@pytest.mark.parametrize("guest, options", [
    pytest.param("io_counter", ["--vcpus=2"], id="device accesses"),
    pytest.param("smp", ["--vcpus=2", "--irqchip=full", "--eventfds"], id="interrupts"),
    pytest.param("smp", ["--vcpus=2", "--irqchip=split", "--eventfds"], id="split irqchip"),
])
def test_a_vmm_never_sees_an_interruption_that_it_has_not_asked_for(stage, guest, options):
    vm = Vm(stage, guest, "--eintr-is-fatal", *options)
    for number in range(1, CHECKPOINTS // 2 + 1):
        if number % 10 == 0:
            vm.next_life()
            vm.expect_to_run()
        else:
            vm.target.checkpoint().unlink()
            vm.expect_no_complaint()
    vm.expect_to_run()
    counts = vm.finish()
    assert counts["interrupted_runs"] <= 2 * 2, "more than the kicks of the end"


LOCKED_VMS = {
    "device accesses": ("io_counter", ["--vcpus=2", "--eventfds", "--coalesced", "--duplicates"]),
    "interrupts": ("smp", ["--vcpus=2", "--irqchip=full", "--eventfds", "--signal-mask"]),
}


@pytest.mark.parametrize("guest, options", LOCKED_VMS.values(), ids=LOCKED_VMS.keys())
def test_a_vmm_that_dies_of_any_call_but_its_own_lives_through_a_refused_checkpoint(stage, guest, options):
    vm = Vm(stage, guest, "--locked-in=own", *options)
    vm.expect_to_run()
    for _ in range(5):
        outcome = stage.vmckpt("checkpoint", vm.target.name)
        assert outcome.status != 0 and "seccomp filter" in outcome.stderr, outcome
        vm.expect_to_run()
    vm.finish()


@pytest.mark.parametrize("guest, options", LOCKED_VMS.values(), ids=LOCKED_VMS.keys())
def test_a_vmm_whose_list_has_the_calls_of_a_checkpoint_is_saved_and_restarted(stage, guest, options):
    vm = Vm(stage, guest, "--locked-in=checkpoint", *options)
    for _ in range(3):
        vm.expect_to_run()
        vm.target.checkpoint().unlink()
        vm.expect_to_run()
        vm.next_life()
    vm.expect_to_run()
    vm.finish()


def test_neither_a_reused_number_nor_an_unmapped_kvm_run_leads_to_memory_of_others(stage):
    vm = Vm(stage, "io_counter", "--vcpus=2", "--duplicates", "--unplug")
    for _ in range(3):
        vm.expect_to_run()
        vm.target.checkpoint().unlink()
        vm.expect_to_run()
        vm.next_life()
    vm.expect_to_run()
    vm.finish()


def pause_with_nothing_unfinished(stage, vm):
    """A kick that meets a vCPU just behind KVM_RUN parks it with an access that nobody has done yet: nothing can be saved then."""
    for _ in range(10):
        vm.pause()
        outcome = stage.vmckpt("checkpoint", vm.target.name, "--json")
        if outcome.status == 0:
            pathlib.Path(outcome.json["image"]).unlink()
            return
        assert "unfinished I/O" in outcome.stderr, outcome
        vm.go_on()
        vm.expect_to_run()
    pytest.fail("unfinished I/O at each of ten pauses")


def test_vcpus_that_are_parked_in_the_handler_of_their_kick_can_be_saved(stage):
    vm = Vm(stage, "smp", "--vcpus=2", "--irqchip=full", "--parks-in-handler")
    for _ in range(3):
        vm.expect_to_run()
        pause_with_nothing_unfinished(stage, vm)
        vm.target.checkpoint().unlink()
        vm.next_life()
        vm.go_on()
    vm.expect_to_run()
    vm.finish()


# ---- a gate that stays closed for long ------------------------------------------------------------------------------

LEASE_US = 4_500_000  # more than 2^33 ticks of the TSC take, at 2 GHz


def begin_slow_checkpoint(stage, vm):
    """A checkpoint that waits for an access of the first vCPU. The second one stands still meanwhile."""
    vm.expect_to_run()
    slow = pathlib.Path(stage.go_file + ".slow")
    slow.touch()
    since = vm.mark()
    wait_until(lambda: stands_still(vm, since, 0, 300_000), lambda: f"the first vCPU waits; {vm.target.report()}")
    process = stage.start([VMCKPT, "checkpoint", vm.target.name, "--freeze-timeout", "60"], stdout=subprocess.DEVNULL)
    since = vm.mark()
    wait_until(lambda: stands_still(vm, since, 1, 300_000), lambda: f"the gate is closed; {vm.target.report()}")
    return slow, process


def stands_still(vm, since, vcpu, for_us):
    beats = vm.beats(since)
    return beats and any(
        later["elapsed_us"] - earlier["elapsed_us"] >= for_us and later["passes"][vcpu] == earlier["passes"][vcpu]
        for earlier in beats[-400:] for later in beats[-1:])


def test_the_gate_stays_closed_for_as_long_as_the_supervisor_waits(own_stage):
    vm = Vm(own_stage, "io_counter", "--vcpus=2")
    slow, process = begin_slow_checkpoint(own_stage, vm)
    since = vm.mark()
    beats = wait_until(lambda: long_enough(vm.beats(since)), "beats for long enough")
    assert {beat["passes"][1] for beat in beats} == {beats[0]["passes"][1]}
    slow.unlink()
    assert process.wait(timeout=60) == 0
    vm.expect_to_run()
    vm.finish()


def long_enough(beats):
    return beats if beats and beats[-1]["elapsed_us"] - beats[0]["elapsed_us"] > LEASE_US else None


def test_vcpus_at_the_gate_go_on_when_the_supervisor_has_died(own_stage):
    vm = Vm(own_stage, "io_counter", "--vcpus=2")
    pid = vm.target.pid
    slow, process = begin_slow_checkpoint(own_stage, vm)
    vm.target.supervisor.kill()
    vm.target.supervisor.wait()
    process.wait(timeout=60)
    since = vm.mark()
    wait_until(lambda: (beats := vm.beats(since)) and beats[-1]["passes"][1] > beats[0]["passes"][1],
               lambda: f"the second vCPU goes on; {vm.target.report()}")
    slow.unlink()
    vm.expect_to_run()
    since = vm.mark()
    vm.permit()
    vm.expect_right(json.loads(vm.wait_for("{", since)))
    wait_until(lambda: not process_is_alive(pid), "the VMM has ended")


# ---- a stopped VMM --------------------------------------------------------------------------------------------------

def is_stopped(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(") ")[2][0] == "T"


@pytest.mark.parametrize("guest, options", [
    pytest.param("io_counter", ["--vcpus=2"], id="device accesses"),
    pytest.param("smp", ["--vcpus=2", "--irqchip=full", "--eventfds"], id="interrupts"),
])
def test_a_vmm_that_job_control_has_stopped_is_saved_as_it_is_and_stays_stopped(stage, guest, options):
    vm = Vm(stage, guest, *options)
    for _ in range(6):
        vm.expect_to_run()
        os.kill(vm.target.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(vm.target.pid), "the VMM is stopped")
        vm.target.checkpoint().unlink()
        assert is_stopped(vm.target.pid)
        vm.next_life()
        wait_until(lambda: is_stopped(vm.target.pid), "the restarted VMM is stopped")
        os.kill(vm.target.pid, signal.SIGCONT)
    vm.expect_to_run()
    vm.finish()
