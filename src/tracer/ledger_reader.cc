#include "tracer/ledger_reader.h"

#include <cstddef>

#include "core/proc.h"
#include "tracer/stopped_world.h"

namespace vmckpt {
namespace {

constexpr uint64_t kPageBytes = 4096;

bool is_ledger(pid_t pid, uint64_t address) {
  struct {
    uint64_t magic0, magic1;
    uint32_t version, bytes;
    uint64_t self;
  } head{};
  static_assert(offsetof(Ledger, self) == 24);
  return read_memory(pid, address, &head, sizeof head).ok() && head.magic0 == kLedgerMagic0 &&
         head.magic1 == kLedgerMagic1 && head.self == address;
}

}  // namespace

Result<uint64_t> find_ledger(pid_t pid, const std::string& maps, uint64_t hint) {
  if (hint != 0 && is_ledger(pid, hint)) return hint;
  // The ledger lies in the zero-initialised pages: the tail of the library's writable mapping or the unnamed one behind it.
  bool in_library = false;
  for (std::string_view line : split_lines(maps)) {
    auto words = split_words(line);
    if (words.size() < 5) continue;
    bool named = words.size() >= 6;
    if (named) in_library = words[5].find("libvmckpt.so") != std::string_view::npos;
    if (!in_library || words[1].substr(0, 2) != "rw") continue;
    uint64_t start = parse_hex(words[0].substr(0, words[0].find('-')));
    uint64_t end = parse_hex(words[0].substr(words[0].find('-') + 1));
    for (uint64_t address = start; address < end; address += kPageBytes) {
      if (is_ledger(pid, address)) return address;
    }
  }
  return error(fmt::format("process {} ({}) runs without the recorder", pid, command_of(pid)),
               "it was not started by `vmckpt launch`, or it executed a static or set-uid program");
}

Result<std::unique_ptr<Ledger>> read_ledger(pid_t pid, uint64_t address) {
  auto ledger = std::make_unique<Ledger>();
  VMCKPT_TRY(read_memory(pid, address, ledger.get(), offsetof(Ledger, notes)));
  if (ledger->version != kLedgerVersion || ledger->bytes != sizeof(Ledger)) {
    return error(fmt::format("process {} was launched by another version of vmckpt", pid),
                 "use that version's `vmckpt checkpoint`");
  }
  uint32_t used = ledger->notes_used < kLedgerNotes ? ledger->notes_used : kLedgerNotes;
  ledger->notes_used = used;
  VMCKPT_TRY(read_memory(pid, address + offsetof(Ledger, notes), ledger->notes, used * sizeof(LedgerNote)));
  return ledger;
}

}  // namespace vmckpt
