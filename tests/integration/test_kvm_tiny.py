# SPDX-License-Identifier: Apache-2.0
"""Virtual machines of our own tiny VMM (tests/guests/kvm): every mode of the processor, every kind of device access,
interrupts of every kind on several vCPUs.

The guests check everything by themselves and the VMM's device checks the guests, so a test has to do no more than let
them run, checkpoint them, kill them, restart them, and look that nobody complained. The native variants do all of that
but the checkpoints: when they fail too, it is not vmckpt that is wrong.

VMCKPT_TEST_KVM_CHECKPOINTS   checkpoints over the device accesses, 500 by default with one vCPU and 500 with two
VMCKPT_TEST_KVM_GENERATIONS   checkpoint, kill, restart in a row, 100 by default
VMCKPT_TEST_KVM_TICKING       checkpoints, 20 a second, over ticking timers, 100 by default; 500 for the whole
"""

import dataclasses
import json
import os
import pathlib
import time

import pytest

from vmckpt_harness import ACTS, ORDINARY_USER, ROOT, VMCKPT, User, process_is_alive, wait_until

KVM = "/dev/kvm"
CHECKPOINTS = int(os.environ.get("VMCKPT_TEST_KVM_CHECKPOINTS", "500"))
GENERATIONS = int(os.environ.get("VMCKPT_TEST_KVM_GENERATIONS", "100"))
TICKING_CHECKPOINTS = int(os.environ.get("VMCKPT_TEST_KVM_TICKING", "100"))
TICK_US = 10_000  # of the PIT and of the LAPIC timer
STAGES = ["real", "protected", "long", "user", "nmi"]  # of the guest "modes", in this order

pytestmark = [
    pytest.mark.skipif(not os.path.exists(KVM), reason=f"{KVM} is missing"),
    pytest.mark.skipif(not os.access(KVM, os.R_OK | os.W_OK), reason=f"{KVM} may not be opened by this user"),
    pytest.mark.skipif(not (ACTS / "kvm" / "tiny_vmm").exists(), reason=f"{ACTS}/kvm/tiny_vmm is not built"),
]
needs_vmckpt = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")


# ---- who runs it ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class MemberOfKvm(User):
    """An ordinary user whom the administrator has put into the group of /dev/kvm."""

    @property
    def prefix(self):
        if self.uid == os.getuid():
            return []
        group = str(os.stat(KVM).st_gid)
        return ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--groups", group, "--"]


OWN_USER = ROOT if os.getuid() == 0 else MemberOfKvm("ordinary user", os.getuid())
OTHER_USER = MemberOfKvm("member of kvm's group", ORDINARY_USER.uid)


@pytest.fixture(params=[OWN_USER, OTHER_USER], ids=lambda user: user.name)
def stage(make_stage, request):
    """One stage of somebody who may use KVM."""
    stage = make_stage(request.param)
    if stage.run(["test", "-r", KVM, "-a", "-w", KVM]).status != 0:
        pytest.skip(f"{KVM} may not be opened by the {request.param.name}")
    return stage


def casts(*variants):
    """Who plays in which variants: everything as the user who runs the tests, the restarts as another one too."""
    pairs = [(OWN_USER, variant) for variant in variants]
    if "restarted" in variants and os.getuid() == 0:
        pairs.append((OTHER_USER, "restarted"))
    return pytest.mark.parametrize("stage, variant", [
        pytest.param(user, variant, id=f"{variant} as {user.name}", marks=[] if variant == "native" else needs_vmckpt)
        for user, variant in pairs
    ], indirect=["stage"])


# ---- a virtual machine ----------------------------------------------------------------------------------------------

class Vm:
    """tiny_vmm with one of its guests."""

    def __init__(self, stage, guest, *options, variant="restarted"):
        self.stage = stage
        self.guest = guest
        words = [ACTS / "kvm" / "tiny_vmm", f"--guest={ACTS / 'kvm' / guest}.bin", f"--go={stage.go_file}", *options]
        self.native = variant == "native"
        self.target = stage.launch(words, native=self.native)
        self.nonce = self.wait_for("NONCE ").split()[1]
        self.wait_for("READY")

    # -- what it says: complete lines only, for one may just be on its way

    def lines(self, since=0):
        return self.target.text()[since:].rpartition("\n")[0].splitlines()

    def mark(self):
        """What is said from now on."""
        return len(self.target.text())

    def expect_no_complaint(self):
        complaints = [line for line in self.lines() if line.startswith("FAIL")]
        assert not complaints, f"{complaints}; {self.target.report()}"

    def beats(self, since=0):
        return [json.loads(line[5:]) for line in self.lines(since) if line.startswith("BEAT {")]

    def wait_for(self, start, since=0):
        def look():
            self.expect_no_complaint()
            return next((line for line in self.lines(since) if line.startswith(start)), None)

        return wait_until(look, lambda: f"a line {start}; {self.target.report()}")

    def expect_to_run(self):
        """Each vCPU that reports passes makes some, and so does every source of interrupts that was in use."""
        since = self.mark()

        def runs_on():
            self.expect_no_complaint()
            beats = self.beats(since)
            if not beats:
                return False
            first, last = beats[0], beats[-1]
            counts = [zip(first[name], last[name]) for name in ("passes", "acknowledged")]
            counts += [[(first[name], last[name])] for name in ("pit_ticks", "lapic_ticks")]
            return all(before < after or before == 0 for pairs in counts for before, after in pairs) and (
                sum(first["passes"]) < sum(last["passes"]))

        wait_until(runs_on, lambda: f"the guest runs on; {self.target.report()}")

    # -- what is done to it

    def permit(self, stages=""):
        """Lets the guest go on to so many stages, or to its end."""
        new = pathlib.Path(self.stage.go_file + ".new")
        new.write_text(str(stages))
        new.replace(self.stage.go_file)

    def pause(self):
        """Returns when no vCPU runs any more."""
        since = self.mark()
        pathlib.Path(self.stage.go_file + ".pause").touch()
        self.wait_for("PAUSED", since)

    def go_on(self):
        since = self.mark()
        os.unlink(self.stage.go_file + ".pause")
        self.wait_for("RESUMED", since)

    def state(self, name):
        """All that KVM tells of the paused VM."""
        since = self.mark()
        file = self.stage.work / f"{name}.json"
        request = pathlib.Path(self.stage.go_file + ".dump.new")
        request.write_text(str(file))
        request.replace(self.stage.go_file + ".dump")
        self.wait_for("DUMPED", since)
        return json.loads(file.read_text())

    def next_life(self):
        """A checkpoint, death, and a restart."""
        image = self.target.checkpoint()
        self.target.kill()
        self.target.restart(image)
        image.unlink()

    def intermission(self, variant):
        if variant == "resumed":
            self.target.checkpoint()
        elif variant == "restarted":
            self.next_life()

    def finish(self, since=None):
        """Lets the guest come to its end, if it has not since. Its counts, when everything was right."""
        since = self.mark() if since is None else since
        self.permit()
        counts = json.loads(self.wait_for("{", since))
        assert self.target.wait_for_end() == 0, self.target.report()
        self.expect_right(counts)
        return counts

    def expect_right(self, counts):
        self.expect_no_complaint()
        assert counts["right"], self.target.report()
        assert counts["doorbells_heard"] == counts["doorbells_rung"], "an ioeventfd lost or doubled a signal"
        for raised, acknowledged in zip(counts["raised"], counts["acknowledged"]):
            assert raised - 1 <= acknowledged <= raised, counts
        nonces = [line.split()[1] for line in self.lines() if line.startswith("GUEST-NONCE ")]
        assert nonces and set(nonces) == {self.nonce}, "what only the guest's memory knows"


# ---- the state of one vCPU in every mode ----------------------------------------------------------------------------

@casts("native", "resumed", "restarted")
def test_every_register_keeps_its_value_in_every_mode_of_the_processor(stage, variant):
    vm = Vm(stage, "modes", variant=variant)
    for number, name in enumerate(STAGES, start=1):
        vm.wait_for(f"STAGE {name}")
        vm.expect_to_run()
        vm.intermission(variant)
        vm.expect_to_run()
        since = vm.mark()
        vm.permit(number)
    vm.finish(since)  # behind the last stage it ends by itself


# What goes on by itself though no vCPU runs.
VOLATILE = {"clock", "pit2"}
VOLATILE_MSRS = {"10", "6e0"}  # the TSC and the deadline that is relative to it
LAPIC_CURRENT_COUNT = range(0x390, 0x394)


def stable_part(state):
    state = {name: value for name, value in state.items() if name not in VOLATILE}
    for vcpu in state["vcpus"]:
        vcpu["msrs"] = {index: value for index, value in vcpu["msrs"].items() if index not in VOLATILE_MSRS}
        if "lapic" in vcpu:
            lapic = bytearray.fromhex(vcpu["lapic"])
            for place in LAPIC_CURRENT_COUNT:
                lapic[place] = 0
            vcpu["lapic"] = lapic.hex()
    return state


def expect_same_state(before, after):
    before, after = stable_part(before), stable_part(after)
    for number, (old, new) in enumerate(zip(before.pop("vcpus"), after.pop("vcpus"), strict=True)):
        old_msrs, new_msrs = old.pop("msrs"), new.pop("msrs")
        assert {i: v for i, v in old_msrs.items() if new_msrs.get(i) != v} == {}, f"MSRs of vCPU {number}"
        assert {n for n in old | new if old.get(n) != new.get(n)} == set(), f"vCPU {number}: {old} {new}"
    assert before == after


def expect_same_after_a_restart(vm, variant, name):
    """Pauses the VM, compares all its state with that in its next life, and lets it go on."""
    vm.pause()
    before = vm.state(f"{name}-before")
    vm.intermission(variant)
    expect_same_state(before, vm.state(f"{name}-after"))
    vm.go_on()


@casts("native", "resumed", "restarted")
def test_all_state_that_kvm_tells_of_a_paused_vm_is_the_same_after_a_restart(stage, variant):
    vm = Vm(stage, "modes", variant=variant)
    for number, name in enumerate(STAGES, start=1):
        vm.wait_for(f"STAGE {name}")
        expect_same_after_a_restart(vm, variant, name)
        vm.expect_to_run()
        since = vm.mark()
        vm.permit(number)
    vm.finish(since)  # behind the last stage it ends by itself


# With a LAPIC in the kernel, interrupts come in though the VM is paused, so they must not be on.
@casts("native", "resumed", "restarted")
@pytest.mark.parametrize("irqchip", ["full", "split"])
def test_a_paused_smp_vm_with_a_vcpu_that_was_never_started_is_the_same_after_a_restart(stage, variant, irqchip):
    vm = Vm(stage, "io_counter", "--vcpus=2", "--spare", f"--irqchip={irqchip}", "--start-all", variant=variant)
    vm.expect_to_run()
    expect_same_after_a_restart(vm, variant, "running")
    vm.expect_to_run()
    vm.finish()


# ---- device accesses ------------------------------------------------------------------------------------------------

def test_the_guest_notices_an_access_that_is_lost(own_stage):
    vm = Vm(own_stage, "io_counter", "--lose-answer=2000", variant="native")
    complaint = wait_until(lambda: [line for line in vm.lines() if line.startswith("FAIL")], "a complaint")
    assert len(complaint) == 1
    assert vm.target.wait_for_end() == 1


DEVICE_VMS = {
    "1 vCPU": ["--vcpus=1"],
    "1 vCPU, duplicates": ["--vcpus=1", "--eventfds", "--coalesced", "--duplicates", "--dont-fork"],
    "2 vCPUs": ["--vcpus=2", "--dont-fork", "--signal-mask"],
    "2 vCPUs, full irqchip": ["--vcpus=2", "--irqchip=full", "--start-all", "--eventfds", "--coalesced"],
    "2 vCPUs, split irqchip": ["--vcpus=2", "--irqchip=split", "--start-all", "--duplicates", "--spare"],
}


@casts("native", "restarted")
@pytest.mark.parametrize("options", DEVICE_VMS.values(), ids=DEVICE_VMS.keys())
def test_no_access_is_lost_doubled_or_torn_by_a_few_restarts(stage, variant, options):
    vm = Vm(stage, "io_counter", *options, variant=variant)
    for _ in range(3):
        vm.expect_to_run()
        vm.intermission(variant)
    vm.expect_to_run()
    vm.finish()


@needs_vmckpt
@pytest.mark.parametrize("vcpus", [1, 2])
def test_no_access_is_lost_doubled_or_torn_by_many_checkpoints(own_stage, vcpus):
    vm = Vm(own_stage, "io_counter", f"--vcpus={vcpus}", "--eventfds", "--coalesced")
    for number in range(1, CHECKPOINTS + 1):
        if number % 20 == 0:
            vm.next_life()
            vm.expect_to_run()
        else:
            vm.target.checkpoint().unlink()
            vm.expect_no_complaint()
    vm.expect_to_run()
    vm.finish()


# ---- interrupts, several vCPUs --------------------------------------------------------------------------------------

SMP_VMS = {
    "1 vCPU": ["--vcpus=1", "--irqchip=full", "--eventfds"],
    "2 vCPUs": ["--vcpus=2", "--irqchip=full", "--eventfds", "--spare", "--dont-fork"],
    "2 vCPUs, split irqchip": ["--vcpus=2", "--irqchip=split", "--eventfds", "--spare"],
    "4 vCPUs, duplicates": ["--vcpus=4", "--irqchip=full", "--eventfds", "--duplicates", "--signal-mask"],
}


@casts("native", "resumed", "restarted")
@pytest.mark.parametrize("options", SMP_VMS.values(), ids=SMP_VMS.keys())
def test_interrupts_of_every_kind_go_on_and_a_waiting_vcpu_can_still_be_started(stage, variant, options):
    vm = Vm(stage, "smp", *options, variant=variant)
    vm.expect_to_run()
    vm.intermission(variant)
    vm.expect_to_run()
    if "--spare" in options:
        since = vm.mark()
        vm.permit(1)
        vm.wait_for("SPARE", since)
        vm.expect_to_run()
        vm.intermission(variant)
    vm.expect_to_run()
    counts = vm.finish()
    assert counts["lapic_ticks"] > 0


@needs_vmckpt
def test_an_smp_vm_lives_through_many_generations(stage):
    vm = Vm(stage, "smp", "--vcpus=2", "--irqchip=full", "--spare", "--eventfds", "--dont-fork")
    for generation in range(GENERATIONS):
        vm.expect_to_run()
        if generation == GENERATIONS // 2:
            since = vm.mark()
            vm.permit(1)
            vm.wait_for("SPARE", since)
        vm.next_life()
    vm.expect_to_run()
    vm.finish()


@needs_vmckpt
def test_with_a_split_irqchip_no_end_of_a_level_triggered_interrupt_is_lost_on_its_way_to_the_vmm(own_stage):
    """It is for some microseconds a thing that KVM has noted for itself. Lost, the source would stand still from then on."""
    vm = Vm(own_stage, "smp", "--vcpus=2", "--irqchip=split", "--eventfds")
    for _ in range(GENERATIONS):
        vm.expect_to_run()
        vm.next_life()
    vm.expect_to_run()
    assert vm.finish()["acknowledged"][1] > 0, "no level-triggered interrupt has come"


@casts("native", "resumed")
def test_twenty_checkpoints_a_second_lose_no_tick_of_the_timers(stage, variant):
    vm = Vm(stage, "smp", "--vcpus=2", "--irqchip=full", "--eventfds", variant=variant)
    vm.expect_to_run()
    due = time.monotonic()
    taken = 0
    while taken < TICKING_CHECKPOINTS:
        if variant == "resumed":
            vm.target.checkpoint().unlink()
        taken += 1
        due = max(due + 0.05, time.monotonic())
        time.sleep(max(0, due - time.monotonic()))

    # The PIT was set up between the last beat before the first tick and the first one after it. What it ticked while
    # the VM did not run, KVM delivers later; so in the end there are neither fewer nor more than there was time for.
    beats = vm.beats()
    first = next(number for number, beat in enumerate(beats) if beat["pit_ticks"])
    begin_us = beats[first - 1]["elapsed_us"]

    def behind(beat):
        return (beat["elapsed_us"] - begin_us) / TICK_US - beat["pit_ticks"]

    assert all(behind(beat) >= -1 for beat in beats[first:]), "the PIT ticked too often"
    slack = (beats[first]["elapsed_us"] - begin_us) / TICK_US + 3
    wait_until(lambda: behind(vm.beats()[-1]) <= slack, lambda: f"the PIT catches up; {vm.target.report()}")

    # The LAPIC timer keeps one tick at most, and a busy host loses some of them even without checkpoints.
    beats = vm.beats()
    expected = (beats[-1]["elapsed_us"] - begin_us) / TICK_US
    assert expected * 0.7 <= beats[-1]["lapic_ticks"] <= expected + 1
    vm.finish()


# ---- the rest -------------------------------------------------------------------------------------------------------

@needs_vmckpt
def test_one_image_can_be_restarted_again_and_again(own_stage):
    vm = Vm(own_stage, "smp", "--vcpus=2", "--irqchip=full", "--eventfds")
    vm.expect_to_run()
    image = vm.target.checkpoint()
    for _ in range(3):
        vm.target.kill()
        vm.target.restart(image)
        vm.expect_to_run()
    vm.finish()


@needs_vmckpt
@pytest.mark.parametrize("lives", [1, 2])
def test_the_guest_runs_on_when_the_supervisor_is_killed(own_stage, lives):
    vm = Vm(own_stage, "smp", "--vcpus=2", "--irqchip=full", "--spare", "--eventfds")
    vm.expect_to_run()
    for _ in range(lives - 1):
        vm.next_life()
        vm.expect_to_run()
    pid = vm.target.pid
    vm.target.supervisor.kill()
    vm.target.supervisor.wait()
    vm.expect_to_run()
    since = vm.mark()
    vm.permit()
    counts = json.loads(vm.wait_for("{", since))
    vm.expect_right(counts)
    wait_until(lambda: not process_is_alive(pid), "the VMM has ended")
