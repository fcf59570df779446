// Files that no path leads to (memfd, shared anonymous memory, deleted files), and those that are the memory of a shared mapping
// (shared_files.h): saved by content, shared by mappings and descriptors. One object per (device, inode), however many mappings
// and descriptors refer to it.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "core/fd.h"
#include "core/result.h"
#include "image/memory.pb.h"
#include "memory/file_access.h"

namespace vmckpt {

class ImageWriter;
class ImageReader;

// Checkpoint: content is copied into the image while the world is stopped, since neither fork nor anything else snapshots it.
class CapturedFiles {
 public:
  // `limit_bytes` bounds what is copied within the pause; above it the checkpoint is refused with the reason.
  CapturedFiles(ImageWriter& writer, uint64_t limit_bytes) : writer_(writer), limit_bytes_(limit_bytes) {}

  // `target_fd` is any descriptor of the file; `name` is its link in /proc/PID/fd or maps. Returns the object's id. `kept`: a
  // path leads to the file, and the copy is for the case that none does at restart.
  Result<uint64_t> capture(int target_fd, const std::string& name, bool kept = false);
  // Whether a copy of so many bytes may be kept: it is made within the pause, as all others are, but nobody has asked for it.
  bool has_room_to_keep(uint64_t bytes) const;
  // The same for memory that can only be read through the mapping at `address` of process `pid`.
  Result<uint64_t> capture_mapping(pid_t pid, uint64_t address, uint64_t bytes, uint64_t file_offset, uint64_t device,
                                   uint64_t inode, const std::string& name);

  // Object `id` is a file with a path, whose content restart puts back.
  void note_path(uint64_t id, const std::string& path);
  // The same where it is only kept: if the file is missing.
  void note_path_of_kept(uint64_t id, const std::string& path);
  // Object `id` is the memory of a System V segment.
  void note_segment(uint64_t id, const pb::SystemVSegment& segment);

  const std::map<uint64_t, pb::CapturedFile>& files() const { return files_; }

 private:
  Result<void> charge(uint64_t bytes, const std::string& name);

  ImageWriter& writer_;
  uint64_t limit_bytes_;
  uint64_t used_bytes_ = 0;
  uint64_t kept_bytes_ = 0;
  std::map<uint64_t, pb::CapturedFile> files_;
  std::map<std::pair<uint64_t, uint64_t>, uint64_t> id_by_inode_;
};

// Restart, in the new process: the files made again, each open for reading and writing.
class RebuiltFiles {
 public:
  // Descriptors get numbers from `first_fd` on.
  Result<void> rebuild(const ImageReader& image, int first_fd, const FileAccess& access);
  // Borrowed; -1 when there is no such object, or only a kept one that was not needed.
  int fd(uint64_t id) const;
  // The same for a file that was put back at `path`.
  int fd_of_path(const std::string& path) const;
  // Writes the content of a captured file, kept ones included, into an empty file.
  Result<void> fill(uint64_t id, int fd) const;
  // Its id when the object is a System V segment; otherwise -1.
  int segment(uint64_t id) const;

 private:
  std::map<uint64_t, const pb::CapturedFile*> files_;
  const ImageReader* image_ = nullptr;
  std::map<uint64_t, Fd> fds_;
  std::map<uint64_t, int> segments_;
};

}  // namespace vmckpt
