#!/bin/sh
# Edits an unpacked Linux 6.1 source tree, DIRECTORY, so that the kernel boots where KVM runs kernel-mode code through
# its instruction emulator (the host's module is kvm-pvm, or the processor has no virtualization that KVM can use).
# On hardware and under TCG none of these edits changes what the kernel does, but for the self-test that is left out.
set -eu

cd "$1"

fail() {
    echo "edit-source: $1" >&2
    exit 1
}

# Each edit is checked, since sed says nothing where its pattern is not there.
expect() {
    [ "$(grep -c -F "$1" "$2")" = "$3" ] || fail "$2: expected $3 lines with \"$1\"; not the Linux 6.1 source?"
}

# 1. The emulator has no INT3 in long mode: the self-test at boot would end the guest.
sed -i 's/^\tint3_selftest();/\t(void)int3_selftest;/' arch/x86/kernel/alternative.c
expect '(void)int3_selftest;' arch/x86/kernel/alternative.c 1

# 2. The emulator has no FWAIT. The kernel runs it to provoke pending x87 exceptions, which nothing here has.
sed -i 's/asm volatile("1: fwait\\n"/asm volatile("1: nop\\n"/' arch/x86/kernel/fpu/core.c
expect 'asm volatile("1: nop\n"' arch/x86/kernel/fpu/core.c 1

# 3. SYSCALL in user mode jumps to the kernel's entry, but stays in user mode there: it arrives as a user-mode page
#    fault on entry_SYSCALL_64, with RCX and R11 as SYSCALL leaves them. So the page-fault handler makes the call. Where
#    SYSCALL does what it should, nothing in user mode can fault with its instruction pointer there but a stray jump.
fault=arch/x86/mm/fault.c
sed -i 's|^#include <asm/cpufeature.h>.*|&\n#include <asm/proto.h>\n#include <asm/syscall.h>|' "$fault"
sed -i '/^DEFINE_IDTENTRY_RAW_ERRORCODE(exc_page_fault)/,/^}/ s|^\tprefetchw(&current->mm->mmap_lock);|\
\tif (user_mode(regs) \&\& address == (unsigned long)entry_SYSCALL_64 \&\& regs->ip == address) {\
\t\tregs->ip = regs->cx;\
\t\tregs->flags = regs->r11 \| X86_EFLAGS_IF;\
\t\tregs->orig_ax = regs->ax;\
\t\tregs->ax = -ENOSYS;\
\t\tdo_syscall_64(regs, (int)regs->orig_ax);\
\t\treturn;\
\t}\
&|' "$fault"
expect 'entry_SYSCALL_64 && regs->ip == address' "$fault" 1
