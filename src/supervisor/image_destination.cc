#include "supervisor/image_destination.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include <fcntl.h>
#include <sys/stat.h>

#include "core/fd.h"
#include "image/reader.h"

namespace vmckpt {
namespace {

// The N of the NAME-N.ckpt with the highest one in the folder, 0 if there is none. Others may have been removed meanwhile: a
// number that was used is not used again, or the newest image would not be the one with the highest.
uint64_t highest_number(const std::string& directory, const std::string& name) {
  uint64_t highest = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    const std::string file = entry.path().filename().string();
    constexpr std::string_view kEnd = ".ckpt";
    if (!file.starts_with(name + "-") || !file.ends_with(kEnd)) continue;
    const std::string_view digits = std::string_view(file).substr(name.size() + 1, file.size() - name.size() - 1 - kEnd.size());
    uint64_t number = 0;
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (problem == std::errc() && end == digits.data() + digits.size() && number < uint64_t{1} << 62)
      highest = std::max(highest, number);
  }
  return highest;
}

}  // namespace

Result<ImageDestination> choose_destination(const Target& target, const std::string& output) {
  ImageDestination destination;
  if (output.empty()) {
    destination.numbered_stem = target.image_dir + "/" + target.name;
    destination.number = std::max(target.images_numbered, highest_number(target.image_dir, target.name)) + 1;
    return destination;
  }
  destination.path = output;
  struct stat info {};
  if (::lstat(output.c_str(), &info) != 0) return destination;
  auto refuse = [&](const char* what) {
    return error(fmt::format("{} exists and is {}; it is not overwritten", output, what),
                 "choose another name or remove it");
  };
  if (!S_ISREG(info.st_mode)) return refuse("no regular file");
  Fd fd = VMCKPT_TRY(open_file(output, O_RDONLY));
  auto header = read_image_header(fd.get(), output);
  if (!header.ok()) return refuse("no image");
  if (!std::equal(target.target_id.begin(), target.target_id.end(), header->target_id)) return refuse("another target's image");
  destination.replace = true;
  return destination;
}

}  // namespace vmckpt
