#include "restart/preflight.h"

#include <set>

#include "image/trust.h"
#include "memory/address_space.h"
#include "modules/aio.h"
#include "modules/descriptors.h"
#include "modules/kvm.h"
#include "modules/process.h"
#include "modules/threads.h"
#include "modules/timers.h"
#include "restart/new_process.h"

namespace vmckpt {
namespace {

void keep_problem(Result<void> result, std::vector<Error>& problems) {
  if (!result.ok()) problems.push_back(result.error());
}

void check_mapped_files(const pb::AddressSpace& space, const FileAccess& access, std::vector<Error>& problems) {
  std::set<std::string> seen;
  for (const pb::Mapping& mapping : space.mappings()) {
    bool refers = mapping.kind() == pb::Mapping::FILE_PRIVATE || mapping.kind() == pb::Mapping::FILE_SHARED;
    if (!refers || !seen.insert(mapping.file().path()).second) continue;
    pb::FileIdentity now;
    std::string difference = difference_from(mapping.file(), access, &now);
    // What a shared mapping shows is the file's content, whatever it is by now; a private one was made of the old content.
    const bool opened = !now.path().empty();
    if (mapping.kind() == pb::Mapping::FILE_SHARED && opened && now.size_bytes() >= mapping.file().size_bytes()) continue;
    if (difference.empty()) continue;
    problems.push_back(error(fmt::format("mapped file {} is not what it was: {}", mapping.file().path(), difference),
                             "put the old file back, or checkpoint with --self-contained next time"));
  }
}

}  // namespace

Result<void> preflight(const ImageReader& image, CpuCheck cpu_check, FilePolicy files, std::vector<std::string>& notes) {
  const pb::Image& metadata = image.metadata();
  const FileAccess access(metadata.threads(0).credentials(), files);
  std::vector<Error> problems;
  keep_problem(check_image_trusted(image.fd(), image.path()), problems);
  check_host(metadata.host(), cpu_check, problems, notes);
  keep_problem(check_process_numbers(), problems);
  for (const pb::Thread& thread : metadata.threads()) {
    auto checked = check_thread(thread, notes);
    keep_problem(checked, problems);
    if (!checked.ok()) break;  // the other threads have the same
  }
  check_process(metadata.process(), access, problems);
  keep_problem(check_timers(metadata.process()), problems);
  check_mapped_files(metadata.memory(), access, problems);
  check_aio(metadata.memory(), problems);
  check_kvm(metadata, cpu_check, problems, notes);
  check_descriptors(metadata.descriptors(), access, problems, notes);
  if (problems.empty()) return {};
  std::string text = fmt::format("{} cannot be restarted here", image.path());
  for (const Error& problem : problems) text += "\n  - " + problem.message();
  return error(text);
}

}  // namespace vmckpt
