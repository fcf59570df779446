/* SPDX-License-Identifier: Apache-2.0

   Interrupts of every kind, counted by both sides. vCPU 0 starts the others by INIT and SIPI, then sends one after the
   other a ping; who is halted wakes up and answers with a pong. A ping or pong that is lost, or one too many, shows
   either as a wrong number or as a standstill. Meanwhile PIT and LAPIC timer tick, and the VMM raises interrupts by
   irqfd (edge, level, MSI) and KVM_SIGNAL_MSI, the next of each only when the last one has been acknowledged.

     stage 1: the spare vCPU, which has waited for its SIPI until then, is started and gets pings too
     stage 2: the end

     r12  vCPUs that get pings, 0 included    r14  pings sent in all, by vCPU 0
     r13  the vCPU that is next               r15  rounds */

#include "boot.inc"

/* What belongs to a vCPU, a page each: 64-bit counters. */
#define CPUS 0x20000
#define CPU_ONLINE 0
#define CPU_PINGS_SENT 8
#define CPU_PINGS 16
#define CPU_PONGS 24
#define CPU_LAPIC_TICKS 32
#define CPU_PIT_TICKS 40
#define CPU_INTERRUPTS 48 /* + 8 * source */

#define LAPIC_EOI 0xb0
#define LAPIC_SPURIOUS 0xf0
#define LAPIC_COMMAND 0x300
#define LAPIC_COMMAND_HIGH 0x310
#define LAPIC_TIMER 0x320
#define LAPIC_INITIAL_COUNT 0x380
#define LAPIC_DIVIDE 0x3e0
#define LAPIC_TIMER_PERIODIC 0x20000
#define LAPIC_DIVIDE_BY_16 3
#define LAPIC_100_HZ 625000 /* of KVM's 1 GHz divided by 16 */
#define COMMAND_INIT 0x4500
#define COMMAND_SIPI (0x4600 | LOAD_ADDRESS >> 12)
#define COMMAND_FIXED 0x4000

.macro LAPIC_WRITE reg, value
  mov $LAPIC_ADDRESS, %eax
  movl \value, \reg(%rax)
.endm

.macro IOAPIC_WRITE index, value
  mov $IOAPIC_ADDRESS, %eax
  movl $(\index), (%rax)
  movl $(\value), 0x10(%rax)
.endm

/* The page of the vCPU whose number is in `number`, into `page`. */
.macro CPU_PAGE number, page
  mov \number, \page
  shl $12, \page
  add $CPUS, \page
.endm

LONG_MODE
  lidt interrupt_table_pointer
  LAPIC_WRITE LAPIC_SPURIOUS, $0x1ff
  test %ebp, %ebp
  jz first_vcpu

  /* all others: the rest happens in the handlers */
  CPU_PAGE %ebp, %edi
  ASK REG_VCPUS
  cmp %eax, %ebp
  jae 1f /* the spare one is to be woken by nothing but pings */
  call start_lapic_timer
1:
  incq CPU_ONLINE(%rdi)
2:
  sti
  hlt
  cli
  jmp 2b

start_lapic_timer:
  LAPIC_WRITE LAPIC_DIVIDE, $LAPIC_DIVIDE_BY_16
  LAPIC_WRITE LAPIC_TIMER, $(LAPIC_TIMER_PERIODIC | VECTOR_LAPIC)
  LAPIC_WRITE LAPIC_INITIAL_COUNT, $LAPIC_100_HZ
  ret

/* Starts the vCPU whose number is in r13 and waits for it. */
start_vcpu:
  mov %r13d, %ecx
  shl $24, %ecx
  LAPIC_WRITE LAPIC_COMMAND_HIGH, %ecx
  LAPIC_WRITE LAPIC_COMMAND, $COMMAND_INIT
  LAPIC_WRITE LAPIC_COMMAND, $COMMAND_SIPI
  CPU_PAGE %r13d, %edi
1:
  pause
  cmpq $1, CPU_ONLINE(%rdi)
  jne 1b
  ret

first_vcpu:
  TAKE_NONCE
  ASK REG_VCPUS
  mov %eax, %r12d
  mov $1, %r13d
1:
  cmp %r12d, %r13d
  jae 2f
  call start_vcpu
  inc %r13d
  jmp 1b
2:
  ASK REG_FEATURES
  test $FEATURE_IOAPIC, %eax
  jz 3f
  mov $0xff, %al /* no line of the PICs */
  out %al, $0x21
  out %al, $0xa1
  IOAPIC_WRITE (0x10 + 2 * PIN_PIT), (VECTOR_PIT)
  IOAPIC_WRITE (0x11 + 2 * PIN_PIT), (0)
  IOAPIC_WRITE (0x10 + 2 * PIN_IRQFD), (VECTOR_IRQFD)
  IOAPIC_WRITE (0x11 + 2 * PIN_IRQFD), (0)
  IOAPIC_WRITE (0x10 + 2 * PIN_LEVEL), (0x8000 | VECTOR_LEVEL)
  IOAPIC_WRITE (0x11 + 2 * PIN_LEVEL), (0)
  mov $0x34, %al /* channel 0, both bytes, rate generator */
  out %al, $0x43
  mov $(PIT_DIVISOR & 0xff), %al
  out %al, $0x40
  mov $(PIT_DIVISOR >> 8), %al
  out %al, $0x40
3:
  call start_lapic_timer
  xor %r14d, %r14d
  xor %r15d, %r15d
  SAY "READY\n"
  mov $REG_READY, %edx
  out %eax, %dx

round:
  mov $1, %r13d
ping:
  cmp %r12d, %r13d
  jae round_end
  CPU_PAGE %r13d, %ebx
  incq CPU_PINGS_SENT(%rbx)
  inc %r14
  mov %r13d, %ecx
  shl $24, %ecx
  LAPIC_WRITE LAPIC_COMMAND_HIGH, %ecx
  LAPIC_WRITE LAPIC_COMMAND, $(COMMAND_FIXED | VECTOR_PING)
1:
  cli
  cmp CPUS + CPU_PONGS, %r14
  je 2f
  sti
  hlt
  jmp 1b
2:
  sti
  mov CPU_PINGS_SENT(%rbx), %rcx
  mov CPU_PINGS(%rbx), %rsi
  EXPECT %rcx, %rsi, "pings that arrived"
  inc %r13d
  jmp ping

round_end:
  inc %r15
  mov $REG_PASSES, %edx
  mov %r15d, %eax
  out %eax, %dx
  cmp $1, %r12d
  ja 1f
  sti /* alone: sleep until the next tick */
  hlt
1:
  ASK REG_PERMIT
  cmp $1, %eax
  jb round
  mov %eax, %ebx
  ASK REG_FEATURES
  test $FEATURE_SPARE, %eax
  jz 2f
  ASK REG_VCPUS
  cmp %eax, %r12d
  ja 2f /* it runs already */
  mov %r12d, %r13d
  call start_vcpu
  inc %r12d
  SAY "SPARE\n"
  jmp round
2:
  cmp $2, %ebx
  jb round

  cli
  mov CPUS + CPU_PONGS, %rax
  EXPECT %r14, %rax, "pongs"
  SAY_NONCE
  SAY "PINGS "
  SAY_HEX %r14d
  SAY "\n"
  END END_ALL

/* ---- handlers ------------------------------------------------------------------------------------------------- */

.macro END_OF_INTERRUPT
  mov $LAPIC_ADDRESS, %eax
  movl $0, LAPIC_EOI(%rax)
  pop %rdx
  pop %rax
  iretq
.endm

pit_handler:
  push %rax
  push %rdx
  incq CPUS + CPU_PIT_TICKS
  mov CPUS + CPU_PIT_TICKS, %eax
  mov $(REG_TICKS + 4 * TICKS_PIT), %edx
  out %eax, %dx
  END_OF_INTERRUPT

lapic_handler:
  push %rax
  push %rdx
  CPU_PAGE %ebp, %edx
  incq CPU_LAPIC_TICKS(%rdx)
  test %ebp, %ebp
  jnz 1f
  mov CPU_LAPIC_TICKS(%rdx), %eax
  mov $(REG_TICKS + 4 * TICKS_LAPIC), %edx
  out %eax, %dx
1:
  END_OF_INTERRUPT

ping_handler:
  push %rax
  push %rdx
  CPU_PAGE %ebp, %edx
  incq CPU_PINGS(%rdx)
  LAPIC_WRITE LAPIC_COMMAND_HIGH, $0
  LAPIC_WRITE LAPIC_COMMAND, $(COMMAND_FIXED | VECTOR_PONG)
  END_OF_INTERRUPT

pong_handler:
  push %rax
  push %rdx
  incq CPUS + CPU_PONGS
  END_OF_INTERRUPT

.macro SOURCE_HANDLER name, source
\name:
  push %rax
  push %rdx
  incq CPUS + CPU_INTERRUPTS + 8 * \source
  mov CPUS + CPU_INTERRUPTS + 8 * \source, %eax
  mov $(REG_ACKNOWLEDGE + 4 * \source), %edx
  out %eax, %dx
  END_OF_INTERRUPT
.endm

SOURCE_HANDLER irqfd_handler, SOURCE_IRQFD
SOURCE_HANDLER level_handler, SOURCE_LEVEL
SOURCE_HANDLER signal_handler, SOURCE_SIGNAL
SOURCE_HANDLER msi_route_handler, SOURCE_MSI_ROUTE

.set nmi_handler, unexpected_interrupt
.set breakpoint_handler, unexpected_interrupt

#include "interrupts.inc"
#include "tables.inc"
