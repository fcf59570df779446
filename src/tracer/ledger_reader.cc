#include "tracer/ledger_reader.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include <sys/uio.h>

#include "core/page.h"
#include "core/proc.h"
#include "tracer/remote_memory.h"

namespace vmckpt {
namespace {


// Where the target's maps allow code to run.
class ExecutableRanges {
 public:
  explicit ExecutableRanges(const std::string& maps) {
    for (std::string_view line : split_lines(maps)) {
      auto words = split_words(line);
      if (words.size() < 2 || words[1].size() < 3 || words[1][2] != 'x') continue;
      const size_t dash = words[0].find('-');
      ranges_.emplace_back(RemoteAddr(parse_hex(words[0].substr(0, dash))), RemoteAddr(parse_hex(words[0].substr(dash + 1))));
    }
  }
  bool contain(RemoteAddr address) const {
    return std::any_of(ranges_.begin(), ranges_.end(),
                       [&](const auto& range) { return range.first <= address && address < range.second; });
  }

 private:
  std::vector<std::pair<RemoteAddr, RemoteAddr>> ranges_;
};

// The ledger of the recorder that runs. A library can lie in a process twice: an emulator (qemu-x86_64) loads it into its guest
// program as well, as data that it translates. That copy fills in its own ledger, but its player is no code here.
bool is_ledger(pid_t pid, RemoteAddr address, const ExecutableRanges& code) {
  struct {
    uint64_t magic0, magic1;
    uint32_t version, bytes;
    RemoteAddr self, player_entry;
  } head{};
  static_assert(offsetof(Ledger, self) == 24 && offsetof(Ledger, player_entry) == 32);
  return read_memory(pid, address, &head, sizeof head).ok() && head.magic0 == kLedgerMagic0 &&
         head.magic1 == kLedgerMagic1 && head.self == address && code.contain(head.player_entry);
}

// A program that has locked itself in cannot be asked for its directory: where nothing else is known, it is that of the
// checkpoint. Modules look whether the path leads to what was meant.
void make_absolute(pid_t pid, LedgerNote& note) {
  const bool has_path = note.kind == NoteKind::kInotifyWatch || note.kind == NoteKind::kUnixBind;
  if (!has_path || note.text[0] == '/' || note.text[0] == '\0') return;
  auto directory = read_link(fmt::format("/proc/{}/cwd", pid));
  if (!directory.ok()) return;
  note.text[sizeof note.text - 1] = '\0';
  const std::string path = *directory + "/" + note.text;
  if (path.size() < sizeof note.text) std::memcpy(note.text, path.c_str(), path.size() + 1);
}

// Table T has the notes from kLedgerNotes << T on, as many again.
RemoteAddr address_of_note(const Ledger& ledger, uint32_t number) {
  if (number < kLedgerNotes) return RemoteAddr(ledger.self) + offsetof(Ledger, notes) + uint64_t{number} * sizeof(LedgerNote);
  auto table = static_cast<unsigned>(std::bit_width(number / kLedgerNotes) - 1);
  return RemoteAddr(ledger.note_tables[table]) + uint64_t{number - (kLedgerNotes << table)} * sizeof(LedgerNote);
}

}  // namespace

Result<RemoteAddr> find_ledger(pid_t pid, const std::string& maps, RemoteAddr hint) {
  const ExecutableRanges code(maps);
  if (hint && is_ledger(pid, hint, code)) return hint;
  // The ledger lies in the zero-initialised pages: the tail of the library's writable mapping or the unnamed one behind it.
  bool in_library = false;
  for (std::string_view line : split_lines(maps)) {
    auto words = split_words(line);
    if (words.size() < 5) continue;
    bool named = words.size() >= 6;
    if (named) in_library = words[5].find("libvmckpt.so") != std::string_view::npos;
    if (!in_library || words[1].substr(0, 2) != "rw") continue;
    const RemoteAddr start(parse_hex(words[0].substr(0, words[0].find('-'))));
    const RemoteAddr end(parse_hex(words[0].substr(words[0].find('-') + 1)));
    for (RemoteAddr address = start; address < end; address += kPageBytes) {
      if (is_ledger(pid, address, code)) return address;
    }
  }
  return error(fmt::format("process {} ({}) runs without the recorder", pid, command_of(pid)),
               "it was not started by `vmckpt launch`, or it executed a static or set-uid program");
}

Result<std::unique_ptr<Ledger>> read_ledger(pid_t pid, RemoteAddr address) {
  auto ledger = std::make_unique<Ledger>();
  VMCKPT_TRY(read_memory(pid, address, ledger.get(), offsetof(Ledger, notes)));
  if (ledger->version != kLedgerVersion || ledger->bytes != sizeof(Ledger)) {
    return error(fmt::format("process {} was launched by another version of vmckpt", pid),
                 "use that version's `vmckpt checkpoint`");
  }
  ledger->note_tables_used = std::min(ledger->note_tables_used, kLedgerNoteTables);
  ledger->notes_used = std::min(ledger->notes_used, kLedgerNotes << ledger->note_tables_used);
  uint32_t used = std::min(ledger->notes_used, kLedgerNotes);
  VMCKPT_TRY(read_memory(pid, address + offsetof(Ledger, notes), ledger->notes, used * sizeof(LedgerNote)));
  for (uint32_t i = 0; i < used; ++i) make_absolute(pid, ledger->notes[i]);
  return ledger;
}

Result<std::vector<LedgerNote>> read_further_notes(pid_t pid, const Ledger& ledger) {
  std::vector<LedgerNote> notes;
  for (uint32_t table = 0; table < ledger.note_tables_used; ++table) {
    const uint32_t first = kLedgerNotes << table;
    if (ledger.notes_used <= first) break;
    const uint32_t count = std::min(ledger.notes_used - first, first);
    notes.resize(notes.size() + count);
    VMCKPT_TRY(read_memory(pid, RemoteAddr(ledger.note_tables[table]), &notes[notes.size() - count], count * sizeof(LedgerNote)));
  }
  return notes;
}

Result<void> mark_notes_stale(pid_t pid, const Ledger& ledger, const std::vector<uint32_t>& numbers) {
  constexpr size_t kAtOnce = 512;  // process_vm_writev takes 1024 (IOV_MAX)
  const NoteKind stale = NoteKind::kStale;
  for (size_t done = 0; done < numbers.size(); done += kAtOnce) {
    std::vector<iovec> from, to;
    for (size_t i = done; i < std::min(done + kAtOnce, numbers.size()); ++i) {
      from.push_back({const_cast<NoteKind*>(&stale), sizeof stale});
      to.push_back(
          {reinterpret_cast<void*>((address_of_note(ledger, numbers[i]) + offsetof(LedgerNote, kind)).value()), sizeof stale});
    }
    const auto bytes = static_cast<ssize_t>(from.size() * sizeof stale);
    if (::process_vm_writev(pid, from.data(), from.size(), to.data(), to.size(), 0) != bytes) {
      return errno_error(fmt::format("take notes back in the ledger of process {}", pid));
    }
  }
  return {};
}

}  // namespace vmckpt
