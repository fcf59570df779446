// What the descriptor modules share. One module per kind of kernel object, listed in order in descriptor_kinds.inc; each says
// which open files are its own and has save beside check and restore. Only files of this folder include this header.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>

#include "image/one_process.h"
#include "modules/descriptors.h"

namespace vmckpt {

// One open file description of the stopped target, as /proc shows it.
struct TargetFile {
  struct Number {
    int number;
    bool close_on_exec;
  };
  std::vector<Number> numbers;  // ascending
  std::string link;             // /proc/PID/fd/N: a path, or "pipe:[123]", "anon_inode:[eventfd]" ...
  std::string fdinfo;           // /proc/PID/fdinfo/N
  struct stat status {};
  uint32_t flags = 0;  // as open(2) got them, O_CLOEXEC left out
  int64_t position = 0;
  int socket_domain = -1;  // AF_*, SOCK_* and IPPROTO_* of sockets
  int socket_type = -1;
  int socket_protocol = -1;
  uint64_t file_system = 0;  // magic number, regular files and folders only
  Fd duplicate;              // shares the open file with the target while its descriptors are being saved
  pb::OpenFile* saved = nullptr;

  int lowest() const { return numbers.front().number; }
  // What the image calls it: the lowest number, which no other file of the one process has.
  uint32_t file_id() const { return static_cast<uint32_t>(lowest()); }
  // The lowest number if it is standard input, output or error; otherwise -1.
  int stdio() const { return lowest() <= 2 ? lowest() : -1; }
  std::string describe() const;                    // `descriptor 5 ("pipe:[123]")`, for messages
  bool is_anonymous(std::string_view name) const;  // link is "anon_inode:" + name
};

// The value of `name` in text like "pos:\t0\nflags:\t02\n"; empty when there is no such line.
std::string_view fdinfo_field(std::string_view fdinfo, std::string_view name);
// Whole lines that begin with `prefix`.
std::vector<std::string_view> fdinfo_lines(std::string_view fdinfo, std::string_view prefix);
// The word after `key` within a line like "tfd: 7 events: 19": `key` with its colon.
std::string_view word_after(std::string_view line, std::string_view key);
uint64_t parse_octal(std::string_view text);

struct SaveContext {
  DescriptorSave& save;
  pb::Image& image;
  pb::KernelObjects& objects;  // of the image
  int proc;                                                                // descriptor of /proc/PID
  std::vector<TargetFile> files;                                           // ascending by lowest()
  std::map<std::array<int, 3>, std::vector<std::string>> socket_defaults;  // socket_options.cc
  std::unordered_map<int, const TargetFile*> by_number;
  std::unordered_map<uint64_t, const TargetFile*> by_socket_inode;
  std::map<std::pair<uint64_t, uint64_t>, uint32_t> pipe_ids;  // by device and inode
  std::vector<LedgerNote> further_notes;                       // beyond those in the ledger itself
  std::unordered_multimap<uint64_t, uint32_t> notes_by_key;    // kind and value -> number of the note
  std::set<uint32_t> watch_notes;                              // numbers of notes of watches that are there

  pid_t pid() const { return save.world.pid(); }
  void note(std::string text) { save.notes.push_back(std::move(text)); }
  const TargetFile* find_number(int number) const;  // null when there is none
  const TargetFile* find_socket(uint64_t inode) const;
  // The recorder's note of this kind and value on any number of `file`.
  const LedgerNote* find_ledger_note(NoteKind kind, const TargetFile& file, int64_t value) const;
  // The numbers of all notes of this kind and value, whatever descriptor they are about.
  std::vector<uint32_t> list_ledger_notes(NoteKind kind, int64_t value) const;
  const LedgerNote& ledger_note(uint32_t number) const;
  // A PID that this process sees, as the target's PID namespace numbers it; 0 when it has no number there.
  int32_t pid_in_target(pid_t pid) const;
};

struct CheckContext {
  const pb::Image& image;
  const DescriptorsOfFiles& descriptors;
  const FileAccess& access;
  const std::set<std::string>& put_back;  // paths that need not be there yet
  std::vector<Error>& problems;
  Notes& notes;

  void problem(Error error) { problems.push_back(std::move(error)); }
  void note(std::string text) { notes.push_back(std::move(text)); }
};

// Objects are made at service numbers and get their own numbers when all of them are there.
struct RestoreContext {
  const pb::Image& image;
  const DescriptorsOfFiles& descriptors;
  DescriptorRestore& restore;
  std::map<uint32_t, Fd> built;            // by OpenFile id
  std::set<uint32_t> shared_with_restart;  // dups of restart's own stdio: others see changes of their flags

  void note(std::string text) { restore.notes.push_back(std::move(text)); }
  // Moves a descriptor up to the service numbers, out of the way of the target's.
  Result<Fd> lift(Fd fd) const;
  Result<void> put(const pb::OpenFile& file, Fd fd);
  bool has(uint32_t id) const { return built.count(id) != 0; }
  int fd(uint32_t id) const;  // -1 when it is not built
};

struct DescriptorModule {
  const char* name;
  bool (*recognise)(const TargetFile& file);
  // One open file; `fd` is its duplicate.
  Result<void> (*save)(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved);
  // After all files are saved: what connects them. May be null.
  Result<void> (*save_links)(SaveContext& context);
  // Preflight of all files of this kind. May be null.
  void (*check)(CheckContext& context);
  // Makes all files of this kind.
  Result<void> (*restore)(RestoreContext& context);
};

#define DESCRIPTOR_KIND(name, module) extern const DescriptorModule module;
#include "modules/descriptor_kinds.inc"
#undef DESCRIPTOR_KIND

// descriptor_walk.cc: all numbers of the target, those that share an open file description put together.
Result<std::vector<TargetFile>> walk_descriptors(const StoppedWorld& world, int proc);

// regular_file.cc: a regular file whose content is data, not a message queue or secret memory.
bool has_ordinary_content(const TargetFile& file);
// A file of /proc, /sys and the like, made up by the kernel when it is read.
bool is_pseudo_file(const TargetFile& file);

// memfd.cc: a file that no path leads to. `capture_content` alone: its id.
Result<uint64_t> capture_content(SaveContext& context, const TargetFile& file, int fd, bool kept = false);
Result<void> save_captured(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved);

// file_status.cc: fcntl state that every kind of file has.
Result<void> save_async_io(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved);
Result<void> restore_file_status(RestoreContext& context, const pb::OpenFile& file, int fd);

// file_locks.cc
Result<void> save_locks(const TargetFile& file, pb::OpenFile* saved);
// `located`: the file at `path`, opened with O_PATH.
void check_locks(CheckContext& context, const pb::OpenFile& file, const std::string& path, int located);
Result<void> restore_locks(const RestoreContext& context, const pb::OpenFile& file);

// epoll.cc: the last step, when every file has its numbers.
Result<void> restore_epoll_registrations(RestoreContext& context);

// refused.cc: why an object cannot be saved and what to do.
Error refusal(const TargetFile& file);

// stdio.cc: restart's own stdio in place of a pipe, connection or terminal to the outside, `number` is 0 to 2.
Result<Fd> attach_stdio(RestoreContext& context, const pb::OpenFile& file, int number);

// Whether the file with this saved state may be read, or written, through the descriptor.
inline bool can_read(uint32_t flags) { return (flags & O_ACCMODE) == O_RDONLY || (flags & O_ACCMODE) == O_RDWR; }
inline bool can_write(uint32_t flags) { return (flags & O_ACCMODE) == O_WRONLY || (flags & O_ACCMODE) == O_RDWR; }

// The open file again through /proc/self/fd: same object, an open file description of its own.
Result<Fd> reopen(int fd, int flags);

std::string describe(const pb::OpenFile& file);  // `descriptor 5 ("pipe:[123]")`

}  // namespace vmckpt
