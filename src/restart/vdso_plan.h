// The vdso: code that the kernel maps into every process for gettimeofday and its kin, with data pages beside it ([vvar] ...).
// The program knows its address (auxv, and pointers that libc cached), so the new process's vdso is moved there.
//
// Where the kernel is another one than the checkpoint's, its vdso has other code: then the old code is put back as ordinary
// memory with a jump at the start of each function to the new kernel's function of that name, and the new vdso lies elsewhere.
#pragma once

#include <cstdint>
#include <vector>

#include "core/result.h"
#include "image/memory.pb.h"
#include "image/process.pb.h"
#include "memory/maps.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

struct VdsoPlan {
  std::vector<Vma> parts;     // of the new process, as it starts
  bool same_code = false;     // the image's vdso is this kernel's
  TapeWord parking;           // where the parts wait while everything else is unmapped
  TapeWord final_address;
  std::vector<uint8_t> patched_code;  // of the old vdso, when same_code is false
  uint64_t patched_address = 0;
  struct Jump {
    size_t at = 0;    // where in the patched code its target's address is to stand
    uint64_t to = 0;  // the new function, as a distance from final_address
  };
  std::vector<Jump> jumps;
};

uint64_t vdso_bytes(const std::vector<Vma>& maps);
// Both addresses may be late numbers. `free_address`: where the new vdso may lie for good if it cannot take the old one's place
// (a free range of vdso_bytes).
Result<VdsoPlan> make_vdso_plan(const pb::AddressSpace& space, const std::vector<Vma>& own_maps, const TapeWord& parking,
                                const TapeWord& free_address);
void plan_vdso_parking(const VdsoPlan& plan, TapeDraft& tape);
void plan_vdso_return(const VdsoPlan& plan, TapeDraft& tape);

// Address of a `syscall` instruction in the vdso at its final place (a late number if that is one): the last call in the new
// process is made there, when the player has gone.
Result<TapeWord> syscall_instruction(const VdsoPlan& plan);

}  // namespace vmckpt
