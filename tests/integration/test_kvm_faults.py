# SPDX-License-Identifier: Apache-2.0
"""Whatever fails while a virtual machine is checkpointed, it runs on, and so it does after a restart that failed before.

The VM is the tiny one with the guest that counts every access to its device: one that was lost, doubled or torn by the
gate, or by a half-finished checkpoint, it would tell in the end.
"""

import json
import os
import pathlib
import random
import signal
import time

import pytest

from faults_helpers import (COMMAND_TIMEOUT_S, Injection, command_under_way, expect_refused, fault_in_environment,
                            files_in, forget_ended, needs_strace, release_pause, wait_for_pause)
from test_faults import ATTEMPTS, CHECKPOINT_PHASES, SEED, call_numbers, checkpoint, expect_whole_or_nothing
from test_kvm_tiny import KVM, STAGES, Vm, needs_vmckpt
from vmckpt_harness import ACTS, VMCKPT, process_is_alive, processes_marked, wait_until

pytestmark = [
    pytest.mark.skipif(not os.access(KVM, os.R_OK | os.W_OK), reason=f"{KVM} is missing, or may not be opened"),
    pytest.mark.skipif(not (ACTS / "kvm" / "tiny_vmm").exists(), reason=f"{ACTS}/kvm/tiny_vmm is not built"),
    needs_vmckpt,
]

FAILING_IOCTL = pathlib.Path(__file__).with_name("failing_ioctl.py")

OPTIONS = ["--vcpus=2", "--irqchip=full", "--start-all", "--eventfds", "--coalesced"]

# What the main thread of a supervisor calls to close the gate, to have KVM asked, and to let the VM go on.
CALLS = [
    ("openat", "EACCES"),
    ("ioctl", "EIO"),
    ("ptrace", "EIO"),
    ("ptrace", "ESRCH"),
    ("wait4", "EINTR"),
    ("process_vm_readv", "EPERM"),
    ("process_vm_writev", "ENOMEM"),
    ("clone,clone3", "EAGAIN"),
]

# What KVM is asked in the pause: names and numbers of the requests (linux/kvm.h).
QUESTIONS = {
    "KVM_GET_IRQCHIP": 0xc208ae62,
    "KVM_GET_PIT2": 0x8070ae9f,
    "KVM_GET_CLOCK": 0x8030ae7c,
    "KVM_GET_MP_STATE": 0x8004ae98,
    "KVM_GET_REGS": 0x8090ae81,
    "KVM_GET_XCRS": 0x8188aea6,
    "KVM_GET_DEBUGREGS": 0x8080aea1,
    "KVM_GET_VCPU_EVENTS": 0x8040ae9f,
    "KVM_GET_LAPIC": 0x8400ae8e,
}


@pytest.fixture
def chance(request):
    print(f"VMCKPT_TEST_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


def start(stage, *more, fault=None):
    if fault is None:
        return Vm(stage, "io_counter", *OPTIONS, *more)
    with fault_in_environment(stage, fault):
        return Vm(stage, "io_counter", *OPTIONS, *more)


def expect_good_image(stage, vm, image):
    """A checkpoint works, and a VM comes out of it."""
    stage.vmckpt_ok("checkpoint", "target", "-o", image)
    vm.target.kill()
    vm.target.restart(image)
    vm.expect_to_run()
    vm.finish()


def expect_right_end(vm, pid):
    """The VM runs on, to its end, without a supervisor."""
    vm.expect_to_run()
    since = vm.mark()
    vm.permit()
    vm.expect_right(json.loads(vm.wait_for("{", since)))
    wait_until(lambda: not process_is_alive(pid), "the VMM has ended")


@needs_strace
@pytest.mark.parametrize("calls, error", CALLS)
def test_whichever_system_call_of_a_pause_fails_the_vm_runs_on(own_stage, chance, calls, error):
    vm = start(own_stage)
    supervisor = vm.target.supervisor.pid
    image = own_stage.images / "image.ckpt"
    with Injection(own_stage, supervisor, calls, []) as counting:
        expect_whole_or_nothing(own_stage, checkpoint(own_stage, "-o", image), image)
    for number in call_numbers(len(counting.names_of_calls(supervisor)), chance):
        print(f"call {number} of {calls} fails with {error}")
        with Injection(own_stage, supervisor, calls, [f"{calls}:error={error}:when={number}"]) as injection:
            outcome = checkpoint(own_stage, "-o", image)
        print(*injection.injected(), outcome, sep="\n")
        assert injection.injected() or outcome[0] == 0
        expect_whole_or_nothing(own_stage, outcome, image)
        vm.expect_to_run()
    expect_good_image(own_stage, vm, image)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_kvm_does_not_answer_refuses_the_checkpoint_and_the_vm_runs_on(own_stage, question):
    vm = start(own_stage, f"--fail-ioctl={QUESTIONS[question]:#x}")
    expect_refused(checkpoint(own_stage), question, "Input/output error")
    assert files_in(own_stage.images) == []
    vm.expect_to_run()
    vm.finish()


@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_a_supervisor_that_is_killed_in_a_phase_leaves_the_vm_running(own_stage, phase):
    vm = start(own_stage, fault=f"kill:{phase}")
    pid, supervisor = vm.target.pid, vm.target.supervisor.pid
    expect_refused(checkpoint(own_stage))
    wait_until(lambda: not process_is_alive(supervisor), "the supervisor is gone")
    assert files_in(own_stage.images) == []
    expect_right_end(vm, pid)


@needs_strace
@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_a_vm_that_is_killed_in_a_phase_leaves_a_whole_image_or_none(own_stage, phase):
    vm = start(own_stage, fault=f"pause:{phase}")
    image = own_stage.images / "image.ckpt"
    pid, supervisor = vm.target.pid, vm.target.supervisor.pid
    with command_under_way(own_stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(supervisor)
        os.kill(pid, signal.SIGKILL)
        release_pause(own_stage, supervisor)
    assert vm.target.wait_for_end(COMMAND_TIMEOUT_S) == 128 + signal.SIGKILL
    if command.outcome[0] != 0:
        expect_refused(command.outcome)
        assert files_in(own_stage.images) == []
        return
    vm.target.restart(image)
    vm.expect_to_run()
    vm.finish()


@pytest.mark.parametrize("attempt", range(ATTEMPTS))
def test_a_supervisor_that_is_killed_at_any_time_leaves_the_vm_running(own_stage, chance, attempt):
    del attempt
    vm = start(own_stage)
    image = own_stage.images / "image.ckpt"
    pid, supervisor = vm.target.pid, vm.target.supervisor.pid
    delay_s = chance.uniform(0, 0.03)
    print(f"killed after {delay_s * 1000:.1f} ms")
    with command_under_way(own_stage, "checkpoint", "target", "-o", image) as command:
        time.sleep(delay_s)
        os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not process_is_alive(supervisor), "the supervisor is gone")
    expect_right_end(vm, pid)
    if image.exists():
        own_stage.vmckpt_ok("verify", image)


# ---- a restart that fails -------------------------------------------------------------------------------------------

# What a restart tells KVM; all VMs of this file need all of it.
KVM_SET_MSRS = 0x4008ae89
ORDERS = {
    "KVM_CREATE_VM": 0xae01,
    "KVM_CREATE_VCPU": 0xae41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020ae46,
    "KVM_CREATE_IRQCHIP": 0xae60,
    "KVM_SET_IRQCHIP": 0x8208ae63,
    "KVM_SET_PIT2": 0x4070aea0,
    "KVM_SET_LAPIC": 0x4400ae8f,
    "KVM_SET_XSAVE": 0x5000aea5,
    "KVM_SET_REGS": 0x4090ae82,
    "KVM_SET_VCPU_EVENTS": 0x4040aea0,
    "KVM_SET_MP_STATE": 0x4004ae99,
    "KVM_SET_CLOCK": 0x4030ae7b,
    "KVM_IOEVENTFD": 0x4040ae79,
}


def test_a_kvm_call_that_fails_at_restart_ends_it_with_its_name_and_leaves_the_image_good(own_stage):
    vm = start(own_stage)
    vm.expect_to_run()
    image = vm.target.checkpoint()
    vm.target.kill()
    forget_ended(own_stage)
    for name, request in ORDERS.items():
        done = own_stage.run([FAILING_IOCTL, hex(request), VMCKPT, "restart", image, "--detach"], timeout_s=COMMAND_TIMEOUT_S)
        expect_refused((done.status, done.stdout, done.stderr), name, "Input/output error")
        wait_until(lambda: processes_marked(own_stage.mark) == set(), "no process is left")
        assert own_stage.list() == []
    own_stage.vmckpt_ok("verify", image)
    vm.target.restart(image)
    vm.expect_to_run()
    vm.finish()


def test_an_msr_whose_value_the_guest_would_lose_ends_the_restart_with_its_number(own_stage):
    vm = Vm(own_stage, "modes")
    for number, name in enumerate(STAGES[:STAGES.index("long")], start=1):
        vm.wait_for(f"STAGE {name}")
        vm.permit(number)
    vm.wait_for("STAGE long")  # from here on there are MSRs with values of the guest's own
    image = vm.target.checkpoint()
    vm.target.kill()
    forget_ended(own_stage)
    done = own_stage.run([FAILING_IOCTL, hex(KVM_SET_MSRS), VMCKPT, "restart", image, "--detach"])
    expect_refused((done.status, done.stdout, done.stderr), "the saved value of the MSR 0x")
    vm.target.restart(image)
    vm.expect_to_run()
    vm.finish()
