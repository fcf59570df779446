/* SPDX-License-Identifier: Apache-2.0

   Does nothing but reads and writes of the device, in every size and manner: single, by string instructions, reading
   and writing in one instruction, and such that KVM has to cut in two. Each answer must be the last one plus one, and
   the device expects the same of each write; so no access can be lost, doubled or torn unnoticed. Every vCPU runs it,
   with numbers of its own.

     r12  the last answer of the counter           r8   this vCPU's pages in FAR
     r13  the last number of the sequence          r9   features
     r14  the last value of the increment register r10  collected writes
     r15  passes                                   r11  rings of the doorbells */

#include "boot.inc"

/* rax holds an answer of so many bytes: it must be the next one. */
.macro ANSWER bytes, what
  inc %r12
  .if \bytes == 1
  movzbl %al, %eax
  movzbl %r12b, %ebx
  .elseif \bytes == 2
  movzwl %ax, %eax
  movzwl %r12w, %ebx
  .elseif \bytes == 4
  mov %eax, %eax
  mov %r12d, %ebx
  .else
  mov %r12, %rbx
  .endif
  EXPECT %rbx, %rax, "\what"
.endm

/* The next number of the sequence, into rax. */
.macro NEXT
  inc %r13
  mov %r13, %rax
.endm

LONG_MODE
  test %ebp, %ebp
  jnz 1f
  TAKE_NONCE
1:
  ASK REG_FEATURES
  mov %eax, %r9d
  mov %ebp, %r8d
  shl $17, %r8d
  add $FAR_ADDRESS, %r8d
  xor %r10d, %r10d
  xor %r11d, %r11d
  xor %r15d, %r15d
  mov $COUNTER_ADDRESS, %esi
  mov (%rsi), %r12
  mov %r12, %r13
  mov $SEQUENCE_ADDRESS, %edi
  mov %r13, (%rdi)
  mov $(DEVICE_ADDRESS + REG_INCREMENT), %edi
  mov (%rdi), %r14d
  SAY "READY "
  SAY_HEX %ebp
  SAY "\n"

pass:
  inc %r15

  /* reads of the port */
  mov $REG_COUNTER, %edx
  in %dx, %al
  ANSWER 1, "byte from a port"
  in %dx, %ax
  ANSWER 2, "word from a port"
  in %dx, %eax
  ANSWER 4, "double word from a port"
  cld
  lea -128(%rsp), %rdi
  mov $5, %ecx
  rep insb
  mov $3, %ecx
  rep insw
  mov $7, %ecx
  rep insl
  lea -128(%rsp), %rsi
  mov $5, %edi
2:
  lodsb
  ANSWER 1, "byte of a string from a port"
  dec %edi
  jnz 2b
  mov $3, %edi
2:
  lodsw
  ANSWER 2, "word of a string from a port"
  dec %edi
  jnz 2b
  mov $7, %edi
2:
  lodsl
  ANSWER 4, "double word of a string from a port"
  dec %edi
  jnz 2b

  /* reads of memory */
  mov $COUNTER_ADDRESS, %esi
  mov 1(%rsi), %al
  ANSWER 1, "byte from memory"
  mov 2(%rsi), %ax
  ANSWER 2, "word from memory"
  mov 4(%rsi), %eax
  ANSWER 4, "double word from memory"
  mov 8(%rsi), %rax
  ANSWER 8, "quad word from memory"
  push 8(%rsi)
  pop %rax
  ANSWER 8, "quad word pushed from memory"
  movdqu (%rsi), %xmm0
  movdqu %xmm0, -64(%rsp)
  mov -64(%rsp), %rax
  ANSWER 8, "first half of sixteen bytes"
  mov -56(%rsp), %rax
  ANSWER 8, "second half of sixteen bytes"
  mov 0xffc(%rsi), %rax
  mov %rax, -8(%rsp)
  ANSWER 4, "what lies before the end of a page"
  mov -4(%rsp), %eax
  ANSWER 4, "what lies after the end of a page"
  lea -64(%rsp), %rdi
  mov $3, %ecx
  rep movsq
  lea -64(%rsp), %rsi
  mov $3, %edi
2:
  lodsq
  ANSWER 8, "quad word of a string from memory"
  dec %edi
  jnz 2b

  /* writes to the port */
  mov $REG_SEQUENCE, %edx
  NEXT
  out %al, %dx
  NEXT
  out %ax, %dx
  NEXT
  out %eax, %dx
  lea -128(%rsp), %rdi
  mov $6, %ecx
2:
  NEXT
  stosw
  loop 2b
  lea -128(%rsp), %rsi
  mov $6, %ecx
  rep outsw

  /* writes to memory */
  mov $SEQUENCE_ADDRESS, %edi
  NEXT
  mov %al, 3(%rdi)
  NEXT
  mov %ax, 2(%rdi)
  NEXT
  mov %eax, 4(%rdi)
  NEXT
  mov %rax, 8(%rdi)
  NEXT
  mov %rax, -64(%rsp)
  NEXT
  mov %rax, -56(%rsp)
  movdqu -64(%rsp), %xmm1
  movdqu %xmm1, 16(%rdi)
  NEXT
  mov %eax, -8(%rsp)
  NEXT
  mov %eax, -4(%rsp)
  mov -8(%rsp), %rax
  mov %rax, 0xffc(%rdi)
  NEXT
  stosq
  lea -64(%rsp), %rsi
  NEXT
  mov %rax, (%rsi)
  NEXT
  mov %rax, 8(%rsi)
  mov $2, %ecx
  rep movsq

  /* a read and a write in one instruction */
  mov $(DEVICE_ADDRESS + REG_INCREMENT), %edi
  incl (%rdi)
  inc %r14d
  addl $1, (%rdi)
  inc %r14d
  mov (%rdi), %eax
  EXPECT %r14, %rax, "value incremented in place"


  /* read-only memory: its words are there, and a write goes to the device instead */
  mov %r15d, %ecx
  and $(ROM_BYTES / 4 - 1), %ecx
  imul $ROM_FACTOR, %ecx, %ebx
  mov ROM_ADDRESS(, %rcx, 4), %eax
  EXPECT %rbx, %rax, "word of the ROM"
  NEXT
  mov %eax, ROM_ADDRESS(, %rcx, 4)

  /* the other slot: a new page each pass, and the page before keeps what it got */
  lea -1(%r15), %ecx
  and $31, %ecx
  shl $12, %ecx
  mov (%r8, %rcx), %rax
  lea -1(%r15), %rbx
  EXPECT %rbx, %rax, "number in the slot above"
  mov %r15d, %ecx
  and $31, %ecx
  shl $12, %ecx
  mov %r15, (%r8, %rcx)

  test $FEATURE_COALESCED, %r9d
  jz 3f
  inc %r10d
  mov $COALESCED_ADDRESS, %edi
  mov %r10d, (%rdi, %rbp, 4)
3:
  test $FEATURE_EVENTFDS, %r9d
  jz 3f
  mov $REG_DOORBELL, %edx
  out %eax, %dx
  mov $DOORBELL_ADDRESS, %edi
  movl $DOORBELL_VALUE, (%rdi)
  add $2, %r11d
3:
  mov $REG_PASSES, %edx
  mov %r15d, %eax
  out %eax, %dx
  ASK REG_PERMIT
  test %eax, %eax
  jz pass

  mov $REG_DOORBELLS, %edx
  mov %r11d, %eax
  out %eax, %dx
  test %ebp, %ebp
  jnz 4f
  SAY_NONCE
4:
  END END_SELF

#include "tables.inc"
