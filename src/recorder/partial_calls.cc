// The target's side of partial_calls.h.
#include "recorder/partial_calls.h"

#include <stddef.h>

#include "recorder/recorder.h"

namespace vmckpt {

static PartialCallTable g_partial_calls;

static_assert(offsetof(PartialCall, done) == 0 && offsetof(PartialCall, rip) == 8 && offsetof(PartialCall, rbx) == 16);
static_assert(offsetof(PartialCall, rsi) == 24 && offsetof(PartialCall, rdx) == 32 && offsetof(PartialCall, r10) == 40);
static_assert(offsetof(PartialCall, in_use) == 48);

// No stack: the program's may have no room. A call that fails now would, in one go, have answered what was done before. rcx and
// r11 are what a system call changes in any case. For unwinders (thread cancellation) the frame is the program's own at its call:
// rip and rbx are in the PartialCall (DWARF register 3 is rbx, 16 the return address), rsp is what it was.
asm(R"(
    .pushsection .text
    .p2align 4
    .hidden vmckpt_partial_call, vmckpt_partial_call_returns
    .globl vmckpt_partial_call, vmckpt_partial_call_returns
    .type vmckpt_partial_call, @function
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa rsp, 0
    .cfi_escape 0x10, 16, 2, 0x73, 8
    .cfi_escape 0x10, 3, 2, 0x73, 16
vmckpt_partial_call:
    syscall
vmckpt_partial_call_returns:
    testq %rax, %rax
    jns 1f
    xorl %eax, %eax
1:  addq (%rbx), %rax
    movq 24(%rbx), %rsi
    movq 32(%rbx), %rdx
    movq 40(%rbx), %r10
    movq 8(%rbx), %rcx
    movq %rbx, %r11
    movq 16(%r11), %rbx
    movq $0, 48(%r11)
    jmp *%rcx
    .cfi_endproc
    .size vmckpt_partial_call, . - vmckpt_partial_call
    .popsection
)");

extern "C" __attribute__((visibility("hidden"))) const char vmckpt_partial_call[], vmckpt_partial_call_returns[];

uint64_t partial_calls_address() {
  g_partial_calls.begin = reinterpret_cast<uint64_t>(vmckpt_partial_call);
  g_partial_calls.returns = reinterpret_cast<uint64_t>(vmckpt_partial_call_returns);
  return reinterpret_cast<uint64_t>(&g_partial_calls);
}

}  // namespace vmckpt
