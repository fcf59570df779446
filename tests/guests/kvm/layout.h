// SPDX-License-Identifier: Apache-2.0
//
// Guest-physical memory and device registers: all that tiny_vmm and its guests agree on. The assembler reads this too,
// so there are only macros here.
//
//   0x00000000  RAM           slot 0; the guest is loaded at LOAD and starts there in real mode, on every vCPU
//   0x000e0000  ROM           slot 1, read-only: word n holds ROM_WORD(n); a write is an MMIO exit
//   0x40000000  FAR           slot 2
//   0xd0000000  the device    its register R answers at port R and at this address + R alike
//   0xd0002000  the counter   every read of every size at every address is one step of a counter
//   0xd0004000  the sequence  every write must be the last one plus one
//   0xd0006000  coalesced     32-bit writes that are collected in the ring of kvm_run (with --coalesced)
//   0xd0008000  the doorbell  an ioeventfd for 32-bit writes of DOORBELL_VALUE (with --eventfds)
//   0xfec00000  IOAPIC, 0xfee00000 LAPIC, both in the kernel

#define LOAD_ADDRESS 0x8000
#define STACKS 0x40000 /* one page each, vCPU 0 first */
#define RAM_BYTES 0xa0000
#define ROM_ADDRESS 0xe0000
#define ROM_BYTES 0x10000
#define ROM_FACTOR 0x9e3779b1 /* word n of the ROM is n * this, modulo 2^32 */
#define FAR_ADDRESS 0x40000000
#define FAR_BYTES 0x200000

#define DEVICE_ADDRESS 0xd0000000
#define COUNTER_ADDRESS 0xd0002000
#define SEQUENCE_ADDRESS 0xd0004000
#define COALESCED_ADDRESS 0xd0006000
#define DOORBELL_ADDRESS 0xd0008000
#define DOORBELL_VALUE 0x1234
#define IOAPIC_ADDRESS 0xfec00000
#define LAPIC_ADDRESS 0xfee00000

/* Device registers. The vCPU that asks is known to the device, so each vCPU has a counter and a sequence of its own. */
#define REG_TEXT 0x402       /* w: a character of a line for stdout */
#define REG_HEX 0x404        /* w: eight hexadecimal digits of a line for stdout */
#define REG_END 0x408        /* w: END_SELF or END_ALL; the verdict is what was printed before */
#define REG_COUNTER 0x500    /* r: 1, 2, 4 bytes: the next value of the counter, its low bytes */
#define REG_SEQUENCE 0x508   /* w: 1, 2, 4 bytes: the low bytes of the next number */
#define REG_INCREMENT 0x510  /* r: a value; w: must be that value plus one */
#define REG_DOORBELL 0x518   /* w: an ioeventfd for all 32-bit writes */
#define REG_NONCE 0x520      /* r: 32 bits, random; 0 from the fifth time on: the device has forgotten them */
#define REG_PERMIT 0x528     /* r: to how many stages the guest may have gone on */
#define REG_VCPU 0x52c       /* r: number of the vCPU that asks */
#define REG_VCPUS 0x530      /* r: how many vCPUs there are, without the spare one */
#define REG_FEATURES 0x534   /* r: FEATURE_ bits */
#define REG_PASSES 0x538     /* w: how far the guest is; beats show it */
#define REG_ACKNOWLEDGE 0x540 /* w: + 4 * source: how many interrupts of that source the guest has had */
#define REG_TICKS 0x560      /* w: + 4 * source: how many timer interrupts the guest has had */
#define REG_DOORBELLS 0x570  /* w: how often this vCPU rang the doorbells, at its end */
#define REG_INJECT_NMI 0x578 /* w: give this vCPU an NMI */
#define REG_READY 0x57c      /* w: the guest is ready for the interrupts of all sources */

#define END_SELF 0
#define END_ALL 1

#define SOURCES 4
#define SOURCE_IRQFD 0     /* irqfd to a pin of the IOAPIC, edge */
/* irqfd with a resample descriptor, level; with a split irqchip the IOAPIC is the VMM's, and one comes with each pass */
#define SOURCE_LEVEL 1
#define SOURCE_SIGNAL 2    /* KVM_SIGNAL_MSI */
#define SOURCE_MSI_ROUTE 3 /* irqfd to an MSI route */

#define TICKS 2
#define TICKS_PIT 0
#define TICKS_LAPIC 1

#define FEATURE_LAPIC 1
#define FEATURE_IOAPIC 2
#define FEATURE_PIT 4
#define FEATURE_EVENTFDS 8
#define FEATURE_COALESCED 16
#define FEATURE_SPARE 32
#define FEATURE_AVX 64     /* XCR0 allows AVX */
#define FEATURE_OSXSAVE 128 /* CR4.OSXSAVE may be set */

/* Lines of the in-kernel IOAPIC and vectors. */
#define PIN_PIT 2
#define PIN_IRQFD 5
#define PIN_LEVEL 10
#define GSI_MSI_ROUTE 24
#define VECTOR_PIT 0x30
#define VECTOR_LAPIC 0x31
#define VECTOR_IRQFD 0x32
#define VECTOR_LEVEL 0x33
#define VECTOR_SIGNAL 0x34
#define VECTOR_MSI_ROUTE 0x35
#define VECTOR_PING 0x40
#define VECTOR_PONG 0x41

#define PIT_HZ 100
#define PIT_DIVISOR 11932 /* 1193182 Hz / PIT_HZ */
