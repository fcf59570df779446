/* SPDX-License-Identifier: Apache-2.0

   One vCPU in each mode that a processor has: real, 32-bit protected, 64-bit kernel and user mode, and inside of an NMI
   with the next one pending. At each stage all registers get known values; then the guest counts in RAM and looks
   whether the registers still hold them, until the device permits it to go on. A wrong one is printed with its name. */

#include "boot.inc"

#define STAGE_REAL 1
#define STAGE_PROTECTED 2
#define STAGE_LONG 3
#define STAGE_USER 4
#define STAGE_NMI 5

#define KERNEL_STACK (STACKS + 0x1000)
#define USER_STACK (STACKS + 0x3000)
#define SCRATCH (STACKS + 0x4000)
#define SECOND_BASE 0x23450
#define FS_BASE (FAR_ADDRESS + 0x100100)
#define GS_BASE (FAR_ADDRESS + 0x101200)
#define MAGIC 0x5ca1ab1e
#define SECOND_MAGIC 0x0ddba11
#define POLL_EVERY 64 /* counts between two looks at the permit */
#define POLL_EVERY_NATIVE 0x40000
#define EXPECTED_CR2 0x12345678
#define EXPECTED_CR8 5
#define CR4_OF_STAGES (CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_DE)

/* Goes on if the flags say equal. */
.macro OR_FAIL say, end, text
  je ok_\@
  \say "FAIL \text\n"
  jmp \end
ok_\@:
.endm

/* gpr_values holds what each general register must hold, from rax to r15 by the processor's numbers. */
.macro LOAD_GPRS names:vararg
  .set n, 0
  .irp name, \names
  .ifnc \name, none
  mov gpr_values + 8 * n, %\name
  .endif
  .set n, n + 1
  .endr
.endm

.macro CHECK_GPRS say, end, stage, names:vararg
  .set n, 0
  .irp name, \names
  .ifnc \name, none
  cmp gpr_values + 8 * n, %\name
  OR_FAIL \say, \end, "\stage: \name"
  .endif
  .set n, n + 1
  .endr
.endm

#define GPRS32 eax, ecx, edx, ebx, none, ebp, esi, edi
#define GPRS64 rax, rcx, rdx, rbx, none, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15

/* Debug registers 0 to 3, all disabled. The accumulator is kept by the caller. */
.macro LOAD_DEBUG accumulator
  .irp number, 0, 1, 2, 3
  mov dr_values + 8 * \number, %\accumulator
  mov %\accumulator, %dr\number
  .endr
.endm

.macro CHECK_DEBUG say, end, stage, accumulator
  .irp number, 0, 1, 2, 3
  mov %dr\number, %\accumulator
  cmp dr_values + 8 * \number, %\accumulator
  OR_FAIL \say, \end, "\stage: dr\number"
  .endr
.endm

.macro CHECK_CONTROL say, end, stage, accumulator, register, value
  mov %\register, %\accumulator
  cmp $(\value), %\accumulator
  OR_FAIL \say, \end, "\stage: \register"
.endm

.macro LOAD_XMMS numbers:vararg
  .irp number, \numbers
  movdqu vector_values + 32 * \number, %xmm\number
  .endr
.endm

/* esi, edi, ecx and the flags are kept by the caller. */
.macro CHECK_XMMS say, end, stage, numbers:vararg
  .irp number, \numbers
  movdqu %xmm\number, SCRATCH
  mov $SCRATCH, %esi
  mov $(vector_values + 32 * \number), %edi
  mov $4, %ecx
  repe cmpsl
  OR_FAIL \say, \end, "\stage: xmm\number"
  .endr
.endm

/* After so many counts: reports them, and jumps to `loop` unless the device permits the stage to end. */
.macro POLL loop, stage, push, pop, registers:vararg
  testl $(POLL_EVERY - 1), stage_count
  jnz \loop
  \push
  mov stage_count, %eax
  mov $REG_PASSES, %dx
  out %eax, %dx
  ASK REG_PERMIT
  cmp $\stage, %eax
  \pop
  jb \loop
.endm

/* ---- real mode ------------------------------------------------------------------------------------------------ */

.code16
.globl start
start:
  cli
  ljmp $0, $1f
1:
  xor %ax, %ax
  mov %ax, %ds
  mov %ax, %es
  mov %ax, %ss
  mov $0x7000, %esp
  TAKE_NONCE
  SAY16 "READY\nSTAGE real\n"
  LOAD_DEBUG eax
  mov $(BASED_ADDRESS >> 4), %ax
  mov %ax, %fs
  movl $MAGIC, %fs:0
  mov $(SECOND_BASE >> 4), %ax
  mov %ax, %gs
  movl $SECOND_MAGIC, %gs:0
  mov $EXPECTED_CR2, %eax
  mov %eax, %cr2
  LOAD_GPRS GPRS32

real_loop:
  incl stage_count
  CHECK_GPRS SAY16, end16, real, GPRS32
  cmpl $MAGIC, %fs:0
  OR_FAIL SAY16, end16, "real: fs"
  cmpl $SECOND_MAGIC, %gs:0
  OR_FAIL SAY16, end16, "real: gs"
  push %eax
  CHECK_DEBUG SAY16, end16, real, eax
  CHECK_CONTROL SAY16, end16, real, eax, cr2, EXPECTED_CR2
  CHECK_CONTROL SAY16, end16, real, esp, esp, 0x6ffc
  pop %eax
  POLL real_loop, STAGE_REAL, "pushal", "popal"
  jmp protected_mode

end16:
  END END_ALL

/* ---- 32-bit protected mode ------------------------------------------------------------------------------------ */

protected_mode:
  lgdtl gdt_pointer
  mov $(CR0_PE | CR0_NE | CR0_MP), %eax
  mov %eax, %cr0
  ljmpl $CODE32, $in_protected_mode
.code32
in_protected_mode:
  mov $DATA32, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  mov $KERNEL_STACK, %esp
  mov $BASED32, %eax
  mov %eax, %fs
  mov %eax, %gs
  mov $CR4_OF_STAGES, %eax
  mov %eax, %cr4
  SAY32 "STAGE protected\n"
  LOAD_XMMS 0, 1, 2, 3, 4, 5, 6, 7
  LOAD_GPRS GPRS32

protected_loop:
  incl stage_count
  CHECK_GPRS SAY32, end32, protected, GPRS32
  cmpl $MAGIC, %fs:0
  OR_FAIL SAY32, end32, "protected: fs"
  cmpl $SECOND_MAGIC, %gs:(SECOND_BASE - BASED_ADDRESS)
  OR_FAIL SAY32, end32, "protected: gs"
  pushal
  cld
  CHECK_XMMS SAY32, end32, protected, 0, 1, 2, 3, 4, 5, 6, 7
  CHECK_DEBUG SAY32, end32, protected, eax
  CHECK_CONTROL SAY32, end32, protected, eax, cr2, EXPECTED_CR2
  CHECK_CONTROL SAY32, end32, protected, eax, cr0, (CR0_PE | CR0_NE | CR0_MP | 0x10)
  CHECK_CONTROL SAY32, end32, protected, eax, cr4, CR4_OF_STAGES
  CHECK_CONTROL SAY32, end32, protected, eax, ds, DATA32
  CHECK_CONTROL SAY32, end32, protected, eax, fs, BASED32
  CHECK_CONTROL SAY32, end32, protected, eax, cs, CODE32
  popal
  POLL protected_loop, STAGE_PROTECTED, "pushal", "popal"
  jmp to_long_mode

end32:
  END END_ALL

/* ---- 64-bit mode ---------------------------------------------------------------------------------------------- */

#define MSRS 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100, 0xc0000101, 0xc0000102, \
  0x277, 0x174, 0x175, 0x176

to_long_mode:
  ENTER_LONG_MODE
  lidt interrupt_table_pointer
  movq $KERNEL_STACK, task_state + 4
  mov $TASK, %eax
  ltr %ax
  ASK REG_FEATURES
  test $FEATURE_OSXSAVE, %eax
  jz 1f
  mov %cr4, %rax
  or $CR4_OSXSAVE, %eax
  mov %rax, %cr4
1:
  mov %cr4, %rax
  mov %rax, expected_cr4
  .set n, 0
  .irp msr, MSRS
  mov $\msr, %ecx
  mov msr_values + 8 * n, %eax
  mov msr_values + 8 * n + 4, %edx
  wrmsr
  .set n, n + 1
  .endr
  movl $MAGIC, %fs:0
  movl $SECOND_MAGIC, %gs:0
  LOAD_DEBUG rax
  mov $EXPECTED_CR8, %eax
  mov %rax, %cr8
  SAY "STAGE long\n"
  LOAD_XMMS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  LOAD_GPRS GPRS64

long_loop:
  incl stage_count
  CHECK_GPRS SAY, end64, long, GPRS64
  cmpl $MAGIC, %fs:0
  OR_FAIL SAY, end64, "long: fs"
  cmpl $SECOND_MAGIC, %gs:0
  OR_FAIL SAY, end64, "long: gs"
  push %rax
  push %rcx
  push %rdx
  push %rsi
  push %rdi
  cld
  CHECK_XMMS SAY, end64, long, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  CHECK_DEBUG SAY, end64, long, rax
  CHECK_CONTROL SAY, end64, long, rax, cr2, EXPECTED_CR2
  CHECK_CONTROL SAY, end64, long, rax, cr3, page_map
  CHECK_CONTROL SAY, end64, long, rax, cr8, EXPECTED_CR8
  mov %cr4, %rax
  cmp expected_cr4, %rax
  OR_FAIL SAY, end64, "long: cr4"
  .set n, 0
  .irp msr, MSRS
  mov $\msr, %ecx
  rdmsr
  cmp msr_values + 8 * n, %eax
  OR_FAIL SAY, end64, "long: low half of msr \msr"
  cmp msr_values + 8 * n + 4, %edx
  OR_FAIL SAY, end64, "long: high half of msr \msr"
  .set n, n + 1
  .endr
  str %ax
  cmp $TASK, %ax
  OR_FAIL SAY, end64, "long: task register"
  sidt SCRATCH
  mov SCRATCH + 2, %rax
  cmp $interrupt_table, %rax
  OR_FAIL SAY, end64, "long: base of the interrupt table"
  sgdt SCRATCH
  mov SCRATCH + 2, %rax
  cmp $gdt, %rax
  OR_FAIL SAY, end64, "long: base of the descriptor table"
  pop %rdi
  pop %rsi
  pop %rdx
  pop %rcx
  pop %rax
  POLL long_loop, STAGE_LONG, "push %rax; push %rdx", "pop %rdx; pop %rax"
  jmp to_user_mode

end64:
  END END_ALL

/* ---- user mode ------------------------------------------------------------------------------------------------ */

to_user_mode:
  SAY "STAGE user\n"
  ASK REG_FEATURES
  mov %eax, features
  pushq $DATA_USER
  pushq $USER_STACK
  pushq $2
  pushq $CODE_USER
  pushq $in_user_mode
  iretq

/* Back to the kernel by INT3: with nothing in rcx, or with the failure's text in rsi and its length in rcx. */
.macro USER_OR_FAIL text
  je ok_\@
  mov $text_\@, %esi
  mov $(end_\@ - text_\@), %ecx
  int3
  .pushsection .text, 1
text_\@: .ascii "FAIL user: \text\n"
end_\@:
  .popsection
ok_\@:
.endm

.macro USER_CHECK_YMMS numbers:vararg
  .irp number, \numbers
  vmovdqu %ymm\number, SCRATCH
  .irp half, 0, 8, 16, 24
  mov SCRATCH + \half, %rax
  cmp vector_values + 32 * \number + \half, %rax
  USER_OR_FAIL "ymm\number"
  .endr
  .endr
.endm

.macro USER_CHECK_XMMS numbers:vararg
  .irp number, \numbers
  movdqu %xmm\number, SCRATCH
  .irp half, 0, 8
  mov SCRATCH + \half, %rax
  cmp vector_values + 32 * \number + \half, %rax
  USER_OR_FAIL "xmm\number"
  .endr
  .endr
.endm

in_user_mode:
  testl $FEATURE_AVX, features
  jz 1f
  .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  vmovdqu vector_values + 32 * \number, %ymm\number
  .endr
  jmp 2f
1:
  LOAD_XMMS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
2:
  LOAD_GPRS GPRS64

user_loop:
  incl stage_count
  .set n, 0
  .irp name, GPRS64
  .ifnc \name, none
  cmp gpr_values + 8 * n, %\name
  USER_OR_FAIL "\name"
  .endif
  .set n, n + 1
  .endr
  cmpl $MAGIC, %fs:0
  USER_OR_FAIL "fs"
  cmpl $SECOND_MAGIC, %gs:0
  USER_OR_FAIL "gs"
  push %rax
  push %rdx
  testl $FEATURE_AVX, features
  jz 1f
  USER_CHECK_YMMS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  jmp 2f
1:
  USER_CHECK_XMMS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
2:
  testl $(POLL_EVERY_NATIVE - 1), stage_count
  jnz 3f
  mov $(DEVICE_ADDRESS + REG_PASSES), %edx
  mov stage_count, %eax
  mov %eax, (%rdx)
  mov (REG_PERMIT - REG_PASSES)(%rdx), %eax
  cmp $STAGE_USER, %eax
  jae 4f
3:
  pop %rdx
  pop %rax
  jmp user_loop
4:
  xor %ecx, %ecx
  int3

breakpoint_handler:
  test %ecx, %ecx
  jz nmi_stage
  mov $REG_TEXT, %edx
  cld
  rep outsb
  END END_ALL

/* ---- inside of an NMI, the next one pending -------------------------------------------------------------------- */

.macro INJECT_NMI
  push %rax
  push %rdx
  mov $REG_INJECT_NMI, %edx
  out %eax, %dx
  pop %rdx
  pop %rax
.endm

nmi_stage:
  mov $KERNEL_STACK, %esp
  INJECT_NMI
  mov $1000, %ecx
1:
  dec %ecx
  jnz 1b
  cmpl $2, nmi_count
  OR_FAIL SAY, end64, "nmi: both have been taken"
  SAY_NONCE
  SAY "COUNTED "
  SAY_HEX stage_count
  SAY "\n"
  END END_ALL

nmi_handler:
  incl nmi_count
  cmpl $1, nmi_count
  ja 1f
  INJECT_NMI /* it stays pending, for this one masks it until IRETQ */
  SAY "STAGE nmi\n"
2:
  incl stage_count
  cmpl $1, nmi_count
  OR_FAIL SAY, end64, "nmi: the pending one is masked"
  POLL 2b, STAGE_NMI, "push %rax; push %rdx", "pop %rdx; pop %rax"
1:
  iretq

.irp name, pit, lapic, irqfd, level, signal, msi_route, ping, pong
  .set \name\()_handler, unexpected_interrupt
.endr

.text 2
.balign 16
stage_count: .long 0
nmi_count: .long 0
features: .quad 0
expected_cr4: .quad 0

gpr_values:
  .set n, 0
  .rept 16
  .quad 0x0123456789abcdef + n * 0x1110111111101111
  .set n, n + 1
  .endr

dr_values: .quad 0x11223344, 0x22334455, 0x33445566, 0x44556677

/* In the order of MSRS: STAR, LSTAR, CSTAR, SFMASK, FS, GS and kernel GS base, PAT in an unusual order, SYSENTER. */
msr_values:
  .quad 0x0023001000000000, 0xffffffff81234560, 0xffffffff82345670, 0x47700
  .quad FS_BASE, GS_BASE, 0xffff888012345000
  .quad 0x0706050400010406
  .quad 0x10, 0xffffffff83456000, 0xffffffff84567000

/* 32 bytes for each of 16 vector registers, all different. */
.balign 32
vector_values:
  .set n, 0
  .rept 64
  .quad 0x0f1e2d3c4b5a6978 ^ (n * 0x0101010101010101)
  .set n, n + 1
  .endr

#include "interrupts.inc"
#include "tables.inc"
