#include "restart/preflight.h"

#include <algorithm>
#include <set>

#include "core/printable.h"
#include "image/one_process.h"
#include "image/trust.h"
#include "memory/address_space.h"
#include "memory/file_owner.h"
#include "memory/page_scan.h"
#include "memory/shared_files.h"
#include "modules/credentials.h"
#include "modules/module.h"
#include "restart/new_process.h"

namespace vmckpt {
namespace {

Error refusal(const ImageReader& image, const std::vector<Error>& problems) {
  std::string text = fmt::format("{} cannot be restarted here", image.path());
  for (const Error& problem : problems) text.append(kListItem) += problem.message();
  return error(text);
}

// Up to where the file is mapped privately, as far as it went.
uint64_t mapped_bytes(const pb::AddressSpace& space, const pb::FileIdentity& file) {
  uint64_t bytes = 0;
  for (const pb::Mapping& mapping : space.mappings()) {
    if (mapping.kind() != pb::Mapping::FILE_PRIVATE || mapping.file().path() != file.path()) continue;
    bytes = std::max(bytes, mapping.file_offset() + (mapping.end() - mapping.start()));
  }
  return std::min(bytes, file.size_bytes());
}

// A build id stands for the code, not for the file: one that was stripped, or cut off, has it too.
void check_size_beside_build_id(const pb::AddressSpace& space, const pb::FileIdentity& file, uint64_t size_bytes_now,
                                std::vector<Error>& problems, std::vector<std::string>& notes) {
  if (size_bytes_now == file.size_bytes()) return;
  const std::string what = fmt::format("mapped file {} has the same build id but {} bytes instead of {}", file.path(),
                                       size_bytes_now, file.size_bytes());
  if (size_bytes_now < mapped_bytes(space, file)) {
    problems.push_back(
        error(what + ", less than was mapped of it", "put the old file back, or checkpoint with --self-contained next time"));
  } else {
    notes.push_back(what + "; it is taken for the same");
  }
}

const char* cure_of_a_missing_file(const pb::Mapping& mapping) {
  if (mapping.kind() == pb::Mapping::FILE_PRIVATE) return "put the old file back, or checkpoint with --self-contained next time";
  if (mapping.writable_file()) return "put the old file back, or use `vmckpt checkpoint --shared-files=all` next time";
  return "put the old file back";
}

void check_mapped_files(const pb::AddressSpace& space, const FileAccess& access, const std::set<std::string>& put_back,
                        std::vector<Error>& problems, std::vector<std::string>& notes) {
  std::set<std::string> seen, written;
  for (const pb::Mapping& mapping : space.mappings()) {
    if (mapping.kind() == pb::Mapping::FILE_SHARED && mapping.writable_file()) written.insert(mapping.file().path());
  }
  for (const pb::Mapping& mapping : space.mappings()) {
    bool refers = mapping.kind() == pb::Mapping::FILE_PRIVATE || mapping.kind() == pb::Mapping::FILE_SHARED;
    if (!refers || !seen.insert(mapping.file().path()).second) continue;
    if (put_back.count(mapping.file().path()) != 0) continue;
    pb::FileIdentity now;
    std::string difference = difference_from(mapping.file(), access, &now);
    // What a shared mapping shows is the file's content, whatever it is by now; a private one was made of the old content.
    const bool opened = !now.path().empty();
    if (opened && written.count(now.path()) != 0 && !access.policy().accept_changed &&
        !is_same_owner(mapping.file().origin(), now.origin().uid())) {
      problems.push_back(another_users(now.path(), mapping.file().origin(), now.origin().uid()));
      continue;
    }
    if (mapping.kind() == pb::Mapping::FILE_SHARED && opened && now.size_bytes() >= mapping.file().size_bytes()) continue;
    if (difference.empty()) {
      if (opened) check_size_beside_build_id(space, mapping.file(), now.size_bytes(), problems, notes);
      continue;
    }
    problems.push_back(error(fmt::format("mapped file {} is not what it was: {}", mapping.file().path(), difference),
                             cure_of_a_missing_file(mapping)));
  }
}

}  // namespace

Result<void> preflight(const ImageReader& image, CpuCheck cpu_check, GuestClock guest_clock, FilePolicy files,
                       std::vector<std::string>& notes) {
  // Alone: what the other checks try on this host (opening files, binding addresses) they are told by the image.
  if (auto trusted = check_image_trusted(image.fd(), image.path()); !trusted.ok()) return refusal(image, {trusted.error()});
  const pb::Image& metadata = image.metadata();
  const FileAccess access = file_access_of(credentials_of(one_process(metadata).leader), files);
  std::vector<Error> problems;
  const std::set<std::string> put_back = paths_put_back(metadata, access);
  Preflight state{metadata, access, put_back, cpu_check, guest_clock, problems, notes};
  state.keep(check_process_numbers());
  for (const StateModule* module : state_modules()) {
    if (module->check != nullptr) module->check(state);
  }
  check_mapped_files(one_process(metadata).memory, access, put_back, problems, notes);
  check_shared_files(metadata, access, problems, notes);
  if (one_process(metadata).memory.guards_size() != 0 && !host_has_guard_regions()) {
    problems.push_back(error("the program has guard regions (MADV_GUARD_INSTALL), which this kernel lacks",
                             "restart it on Linux 6.13 or newer"));
  }
  if (problems.empty()) return {};
  return refusal(image, problems);
}

}  // namespace vmckpt
