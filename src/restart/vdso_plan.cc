#include "restart/vdso_plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include <sys/mman.h>
#include <sys/syscall.h>

#include "core/elf_file.h"

namespace vmckpt {
namespace {

const Vma* code_of(const std::vector<Vma>& parts) {
  for (const Vma& part : parts) {
    if (part.name == "[vdso]") return &part;
  }
  return nullptr;
}

// Functions of a vdso image by name, with their offsets. The image may come from a file: what cannot be read has none.
std::map<std::string, uint64_t> functions_of(const std::string& code) {
  auto vdso = ElfFile::in_memory(code);
  return vdso.ok() ? vdso->functions() : std::map<std::string, uint64_t>();
}

// movabs rax, TARGET; jmp rax. The functions take their arguments in rdi, rsi, rdx; rax is free at their entry.
constexpr uint8_t kJump[] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
constexpr size_t kJumpTarget = 2;

bool forced_foreign() {
  const char* fault = std::getenv("VMCKPT_FAULT");
  return fault != nullptr && std::strcmp(fault, "foreign-vdso") == 0;
}

}  // namespace

uint64_t vdso_bytes(const std::vector<Vma>& maps) {
  uint64_t start = ~uint64_t{0}, end = 0;
  for (const Vma& vma : maps) {
    if (!vma.is_vdso_part()) continue;
    start = std::min(start, vma.start);
    end = std::max(end, vma.end);
  }
  return end > start ? end - start : 0;
}

Result<VdsoPlan> make_vdso_plan(const pb::AddressSpace& space, const std::vector<Vma>& own_maps, const TapeWord& parking,
                                const TapeWord& free_address) {
  VdsoPlan plan;
  plan.parking = parking;
  for (const Vma& vma : own_maps) {
    if (vma.is_vdso_part()) plan.parts.push_back(vma);
  }
  const Vma* own_code = code_of(plan.parts);
  std::vector<const pb::Mapping*> saved;
  const pb::Mapping* saved_code = nullptr;
  for (const pb::Mapping& mapping : space.mappings()) {
    if (mapping.kind() != pb::Mapping::VDSO) continue;
    saved.push_back(&mapping);
    if (mapping.name() == "[vdso]") saved_code = &mapping;
  }
  if (own_code == nullptr) return error("this kernel gives processes no vdso", "start it without vdso=0");
  const std::string code(reinterpret_cast<const char*>(own_code->start), own_code->bytes());
  bool same_layout = saved_code != nullptr && saved.size() == plan.parts.size();
  for (size_t i = 0; same_layout && i < saved.size(); ++i) {
    same_layout = saved[i]->name() == plan.parts[i].name && saved[i]->end() - saved[i]->start() == plan.parts[i].bytes() &&
                  saved_code->start() - saved[i]->start() == own_code->start - plan.parts[i].start;
  }
  plan.same_code = saved_code == nullptr || (same_layout && code == space.vdso_code() && !forced_foreign());
  const uint64_t first = plan.parts.front().start;
  if (plan.same_code && saved_code != nullptr) {
    plan.final_address = saved.front()->start();
    return plan;
  }
  plan.final_address = free_address;
  if (saved_code == nullptr) return plan;  // the program had unmapped its vdso
  plan.patched_address = saved_code->start();
  plan.patched_code.assign(space.vdso_code().begin(), space.vdso_code().end());
  const auto new_functions = functions_of(code);
  for (const auto& [name, offset] : functions_of(space.vdso_code())) {
    auto found = new_functions.find(name);
    if (offset > plan.patched_code.size() || plan.patched_code.size() - offset < sizeof kJump) continue;
    if (found == new_functions.end()) {
      return error(fmt::format("this kernel's vdso has no {}, which the program may call", name),
                   "restart it on the kernel it was checkpointed on");
    }
    std::copy(std::begin(kJump), std::end(kJump), plan.patched_code.begin() + static_cast<ptrdiff_t>(offset));
    plan.jumps.push_back({offset + kJumpTarget, own_code->start - first + found->second});
  }
  return plan;
}

void plan_vdso_parking(const VdsoPlan& plan, TapeDraft& tape) {
  const uint64_t first = plan.parts.front().start;
  for (const Vma& part : plan.parts) {
    tape.call(SYS_mremap, {part.start, part.bytes(), part.bytes(), MREMAP_MAYMOVE | MREMAP_FIXED,
                           plan.parking + (part.start - first)},
              true, fmt::format("move {} away (is the kernel built with CONFIG_MSEAL_SYSTEM_MAPPINGS?)", part.name));
  }
}

void plan_vdso_return(const VdsoPlan& plan, TapeDraft& tape) {
  const uint64_t first = plan.parts.front().start;
  for (const Vma& part : plan.parts) {
    const uint64_t offset = part.start - first;
    tape.call(SYS_mremap, {plan.parking + offset, part.bytes(), part.bytes(), MREMAP_MAYMOVE | MREMAP_FIXED,
                           plan.final_address + offset},
              true, fmt::format("move {} to its old place", part.name));
  }
  if (plan.patched_code.empty()) return;
  tape.call(SYS_mmap, {plan.patched_address, plan.patched_code.size(), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, ~uint64_t{0}, 0}, true, "make room for the old vdso");
  const TapeWord code = tape.data(plan.patched_code.data(), plan.patched_code.size());
  for (const VdsoPlan::Jump& jump : plan.jumps) tape.point(code, jump.at, plan.final_address + jump.to);
  tape.call(kOpCopyBytes, {plan.patched_address, code, plan.patched_code.size()});
  tape.call(SYS_mprotect, {plan.patched_address, plan.patched_code.size(), PROT_READ | PROT_EXEC}, true,
            "protect the old vdso");
}

Result<TapeWord> syscall_instruction(const VdsoPlan& plan) {
  const Vma* code = code_of(plan.parts);
  const auto* bytes = reinterpret_cast<const uint8_t*>(code->start);
  for (uint64_t i = 0; i + 1 < code->bytes(); ++i) {
    if (bytes[i] == 0x0f && bytes[i + 1] == 0x05) {
      return plan.final_address + (code->start + i - plan.parts.front().start);
    }
  }
  return error("this kernel's vdso has no system call instruction");
}

}  // namespace vmckpt
