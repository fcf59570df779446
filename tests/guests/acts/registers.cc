// Every register a thread owns keeps its value: general purpose, direction flag, x87, MXCSR, XMM/YMM/ZMM, AVX-512
// masks, FS and GS base. One thread is checkpointed while it spins in user mode, one while it blocks in read(2), where
// the kernel promises to change rax, rcx and r11 only.

#include <asm/prctl.h>
#include <cpuid.h>

#include <thread>

#include "act.h"

struct alignas(64) Registers {
  uint64_t general[16];  // rax rbx rcx rdx rsi rdi rbp r8 ... r15, flags
  uint8_t fxsave[512];
  uint8_t vector[32][64];
  uint64_t mask[8];
};
static_assert(offsetof(Registers, fxsave) == 128 && offsetof(Registers, vector) == 640);
static_assert(offsetof(Registers, mask) == 2688);

enum VectorKind { kXmm = 0, kYmm = 1, kZmm = 2 };
enum Where { kSpin = 0, kInRead = 1 };

extern "C" {
[[gnu::visibility("hidden")]] volatile int spin_on = 1;
// Loads everything from `in`, stays where it is told, and stores everything to `out`. For kInRead in->general holds
// the arguments of read(2).
void hold_registers(const Registers* in, Registers* out, VectorKind vectors, Where where);
}

asm(R"(
    .text
    .type hold_registers, @function
hold_registers:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rcx              # 16(%rsp) from here on: where
    push %rdx              #  8(%rsp): vectors
    push %rsi              #  0(%rsp): out
    fxrstor 128(%rdi)
    cmp $1, %edx
    je 1f
    jg 2f
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu 640+64*\n(%rdi), %xmm\n
    .endr
    jmp 3f
1:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu 640+64*\n(%rdi), %ymm\n
    .endr
    jmp 3f
2:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 640+64*\n(%rdi), %zmm\n
    .endr
    .irp n, 0,1,2,3,4,5,6,7
    kmovq 2688+8*\n(%rdi), %k\n
    .endr
3:
    cmpl $1, %ecx
    mov 0(%rdi), %rax
    mov 8(%rdi), %rbx
    mov 16(%rdi), %rcx
    mov 24(%rdi), %rdx
    mov 32(%rdi), %rsi
    mov 48(%rdi), %rbp
    mov 56(%rdi), %r8
    mov 64(%rdi), %r9
    mov 72(%rdi), %r10
    mov 80(%rdi), %r11
    mov 88(%rdi), %r12
    mov 96(%rdi), %r13
    mov 104(%rdi), %r14
    mov 112(%rdi), %r15
    mov 40(%rdi), %rdi
    std
    je 5f
4:
    pause
    cmpl $0, spin_on(%rip)
    jne 4b
    jmp 6f
5:
    syscall
6:
    push %rax
    mov 8(%rsp), %rax      # out
    mov %rbx, 8(%rax)
    mov %rcx, 16(%rax)
    mov %rdx, 24(%rax)
    mov %rsi, 32(%rax)
    mov %rdi, 40(%rax)
    mov %rbp, 48(%rax)
    mov %r8, 56(%rax)
    mov %r9, 64(%rax)
    mov %r10, 72(%rax)
    mov %r11, 80(%rax)
    mov %r12, 88(%rax)
    mov %r13, 96(%rax)
    mov %r14, 104(%rax)
    mov %r15, 112(%rax)
    mov %rax, %rdi
    pop 0(%rdi)
    pushfq
    pop 120(%rdi)
    cld
    mov 8(%rsp), %edx
    cmp $1, %edx
    je 7f
    jg 8f
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    movdqu %xmm\n, 640+64*\n(%rdi)
    .endr
    jmp 9f
7:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu %ymm\n, 640+64*\n(%rdi)
    .endr
    vzeroupper
    jmp 9f
8:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 %zmm\n, 640+64*\n(%rdi)
    .endr
    .irp n, 0,1,2,3,4,5,6,7
    kmovq %k\n, 2688+8*\n(%rdi)
    .endr
    vzeroupper
9:
    fxsave 128(%rdi)
    fninit
    movl $0x1f80, 16(%rsp)
    ldmxcsr 16(%rsp)
    add $24, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
    .size hold_registers, . - hold_registers
)");

static const char* const kGeneralNames[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
                                            "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
constexpr uint64_t kDirectionFlag = 0x400;

static void fill_registers(Registers& in) {
  act::fill(in.general, sizeof in.general, act::random_u64());
  act::fill(in.vector, sizeof in.vector, act::random_u64());
  act::fill(in.mask, sizeof in.mask, act::random_u64());
  memset(in.fxsave, 0, sizeof in.fxsave);
  auto put16 = [&](size_t at, uint16_t value) { memcpy(in.fxsave + at, &value, 2); };
  put16(0, 0x0b7f);                                // x87 control: round up, 64-bit precision, all masked
  in.fxsave[4] = 0xff;                             // all eight x87 registers in use
  uint32_t mxcsr = 0x1f80 | 0x6000 | 0x8000;       // round to zero, flush to zero
  memcpy(in.fxsave + 24, &mxcsr, 4);
  for (size_t i = 0; i < 8; i++) {                 // normal numbers: integer bit set, exponent not all ones
    uint64_t mantissa = act::random_u64() | (1ULL << 63);
    memcpy(in.fxsave + 32 + 16 * i, &mantissa, 8);
    put16(32 + 16 * i + 8, static_cast<uint16_t>(0x3fff + i));
  }
}

static std::string hex(const uint8_t* bytes, size_t count) {
  std::string text;
  char digits[3];
  for (size_t i = 0; i < count; i++) {
    snprintf(digits, sizeof digits, "%02x", bytes[i]);
    text += digits;
  }
  return text;
}

static void compare(const std::string& where, const Registers& in, const Registers& out, VectorKind kind,
                    bool in_syscall) {
  for (size_t i = 0; i < 15; i++) {
    std::string name = kGeneralNames[i];
    if (in_syscall && (name == "rax" || name == "rcx" || name == "r11")) continue;
    act::expect_equal(where + ": " + name, in.general[i], out.general[i]);
  }
  act::expect_equal(where + ": direction flag", kDirectionFlag, out.general[15] & kDirectionFlag);
  act::expect_equal(where + ": x87 control word", hex(in.fxsave, 2), hex(out.fxsave, 2));
  act::expect_equal(where + ": x87 tag word", hex(in.fxsave + 4, 1), hex(out.fxsave + 4, 1));
  act::expect_equal(where + ": MXCSR", hex(in.fxsave + 24, 4), hex(out.fxsave + 24, 4));
  for (size_t i = 0; i < 8; i++) {
    act::expect_equal(where + ": st" + std::to_string(i), hex(in.fxsave + 32 + 16 * i, 10),
                      hex(out.fxsave + 32 + 16 * i, 10));
  }
  size_t vector_bytes = kind == kZmm ? 64 : kind == kYmm ? 32 : 16;
  for (size_t i = 0; i < (kind == kZmm ? 32 : 16); i++) {
    act::expect_equal(where + ": vector register " + std::to_string(i), hex(in.vector[i], vector_bytes),
                      hex(out.vector[i], vector_bytes));
  }
  if (kind != kZmm) return;
  for (size_t i = 0; i < 8; i++) act::expect_equal(where + ": k" + std::to_string(i), in.mask[i], out.mask[i]);
}

static uint64_t segment_base(int get) {
  uint64_t base = 0;
  MUST(syscall(SYS_arch_prctl, get, &base));
  return base;
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  VectorKind kind = __builtin_cpu_supports("avx512bw") ? kZmm : __builtin_cpu_supports("avx2") ? kYmm : kXmm;
  int pipe_fds[2];
  MUST(pipe(pipe_fds));

  auto run = [&](const char* name, Where where) {
    Registers in, out;
    char byte = 0;
    fill_registers(in);
    if (where == kInRead) {
      in.general[0] = SYS_read;
      in.general[3] = 1;
      in.general[4] = reinterpret_cast<uint64_t>(&byte);
      in.general[5] = static_cast<uint64_t>(pipe_fds[0]);
    }
    uint64_t gs = reinterpret_cast<uint64_t>(&in);
    MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, gs));
    uint64_t fs = segment_base(ARCH_GET_FS);
    hold_registers(&in, &out, kind, where);
    compare(name, in, out, kind, where == kInRead);
    act::expect_equal(std::string(name) + ": FS base", fs, segment_base(ARCH_GET_FS));
    act::expect_equal(std::string(name) + ": GS base", gs, segment_base(ARCH_GET_GS));
    if (where != kInRead) return;
    act::expect_equal("read(2) in progress returned", 1u, out.general[0]);
    act::expect_equal("byte read", 'x', byte);
  };
  std::thread spinning(run, "spinning in user mode", kSpin);
  std::thread reading(run, "blocked in read(2)", kInRead);

  act::sleep_ms(20);  // both are where they shall be
  act::intermission();

  spin_on = 0;
  MUST(write(pipe_fds[1], "x", 1));
  spinning.join();
  reading.join();
  return act::finish();
}
