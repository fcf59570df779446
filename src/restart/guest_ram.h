// Which memory restart maps from the image: guest RAM, so that a virtual machine runs at once however large it is.
//
// All other anonymous memory is read (page_reads.h). Guest RAM is what a memory slot of KVM names, or what a VMM has marked
// MADV_DONTFORK, in mappings of 16 MiB and more. It is mapped only where the recorder vouches for it, since memory that an image
// backs is not anonymous: the recorder must have seen it made, so that it will see what is discarded, moved and mapped over
// (recorder/ram_ledger.h), and the target's system call filters must allow what making good takes.
#pragma once

#include <vector>

#include "image/image.pb.h"
#include "image/reader.h"
#include "recorder/ram_ledger.h"
#include "tracer/tape_draft.h"

namespace vmckpt {

class GuestRam {
 public:
  // Of an image without a recorder that knows: nothing is mapped.
  GuestRam() = default;
  explicit GuestRam(const ImageReader& image);

  bool is_mapped(const pb::Mapping& mapping) const;
  bool holds(uint64_t address) const;  // inside of a mapping of that kind
  // When the memory is in place: tells the recorder what became of it.
  void draft_ledger(TapeDraft& tape) const;

 private:
  uint64_t address_ = 0;  // of the RamLedger; 0: none
  RamLedger ledger_{};    // as it will be
  std::vector<std::pair<uint64_t, uint64_t>> mapped_;
};

}  // namespace vmckpt
