# SPDX-License-Identifier: Apache-2.0
"""What QEMU and the guest's kernel must be told to run this guest under -accel kvm; README.md says more."""

# Without arch-capabilities: QEMU 7.2 writes that MSR's value back, and an emulated KVM on an AMD host refuses it.
# Without the hypercalls for IPIs: Linux makes them by VMCALL, which that KVM executes again and again for ever. The
# guest then stands still with its interrupts off, as soon as it sends to two processors at once.
PROCESSOR = "host,-arch-capabilities,-kvm-pv-ipi,-kvm-pv-sched-yield"
# And without a local APIC in the kernel, KVM refuses the MSR of interrupts for asynchronous page faults.
PROCESSOR_WITHOUT_IRQCHIP = f"{PROCESSOR},-kvm-asyncpf-int"

# Needed where KVM emulates kernel-mode code, and harmless elsewhere.
KERNEL_OPTIONS = """
    console=ttyS0 quiet panic=1 no_timer_check tsc=reliable random.trust_cpu=on rcupdate.rcu_expedited=1 rodata=off
    noxsave
    clearcpuid=smap,smep,fsgsbase,invpcid,pcid,rdtscp,popcnt,umip,rdrand,rdseed,movbe,cx16,erms,fsrm,hle,rtm
    GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-ERMS,-FSRM,-RTM,-XSAVE,-XSAVEC
""".split()
