// How restart opens the files of an image: with the rights that the target had, not with its own.
//
// Root restarts what has given its privileges up since it was started. Were its files opened as root, by name, whoever
// may change a folder of that name could have the target handed a descriptor of any file. So:
//
//   - Paths in an image come from the kernel and have no symbolic link in them. One that has one now has been exchanged.
//   - Where the target's file-system ids are not the caller's, or its capabilities fewer, this thread takes them on for
//     as long as a file is opened, and what is there must be the very file of the checkpoint.
//   - A daemon keeps files open that it could not open any more (a log that root opened for it). The caller's rights
//     open these, and only these: the inode must be the same, made at the same time. The target had it open already.
//
// Sources: openat2(2) (Linux 5.6), credentials(7), capabilities(7) "Effect of user ID changes on capabilities".
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <sys/types.h>

#include "core/fd.h"
#include "core/result.h"
#include "image/memory.pb.h"
#include "memory/shared_files.h"

namespace vmckpt {

// What the user said about files that are not what they were.
struct FilePolicy {
  bool accept_changed = false;  // --changed-files=accept
  bool empty_missing = false;   // --missing-files=empty
  SharedFiles shared_files = SharedFiles::kRestore;
};

// The file behind `fd`; an O_PATH descriptor will do.
pb::Inode inode_of(int fd);
// Whether it is certainly that file: false where nothing is known of `then`.
bool is_same_inode(const pb::Inode& then, const pb::Inode& now);

// What the kernel asks when a thread opens a file.
struct FileRights {
  uid_t uid = 0;  // of the file system
  gid_t gid = 0;
  std::vector<gid_t> groups{};
  uint64_t effective = 0;  // capabilities
};

class FileAccess {
 public:
  FileAccess() = default;  // the caller's own rights
  explicit FileAccess(FilePolicy policy) : policy_(policy) {}
  FileAccess(const FileRights& target, FilePolicy policy);

  const FilePolicy& policy() const { return policy_; }
  // Whether the target's rights are not the caller's.
  bool is_foreign() const { return foreign_; }

  // The same, where another file than that of the checkpoint is all right as long as the target could open it itself.
  FileAccess accepting_others() const {
    FileAccess other = *this;
    other.policy_.accept_changed = true;
    return other;
  }

  // The file that `path` leads to, opened with O_PATH only: nothing is read and no device is woken. `flags`: O_NOFOLLOW
  // (with it the last component may be a link, which is then what is opened), O_DIRECTORY.
  Result<Fd> locate(const std::string& path, int flags, const pb::Inode& then) const;
  // `flags` as for open(2). What is returned is the file that `locate` finds.
  Result<Fd> open(const std::string& path, int flags, const pb::Inode& then) const;
  // Makes the file, which must not be there, with the target's rights.
  Result<Fd> create(const std::string& path, int flags, mode_t mode) const;
  // An open directory that has been removed.
  Result<Fd> make_removed_directory(int flags) const;
  // A symbolic link that has been removed, opened with O_PATH.
  Result<Fd> make_removed_link(const std::string& text) const;
  // Whether a file that was located may be opened with `wanted` (R_OK, W_OK); sets errno.
  bool permits(int located, int wanted, const pb::Inode& then) const;
  // 0 or -1 and errno, of the call made with the target's rights.
  template <class Call>
  int as_target(Call call) const {
    AsTarget as(*this);
    if (!as.holds()) return -1;
    return call();
  }

 private:
  // While it exists this thread has the target's rights to files. Nothing else changes.
  class AsTarget {
   public:
    explicit AsTarget(const FileAccess& access);
    ~AsTarget();
    AsTarget(const AsTarget&) = delete;
    AsTarget& operator=(const AsTarget&) = delete;
    bool holds() const { return holds_; }  // sets errno

   private:
    bool take(const FileAccess& access);

    bool changed_ = false, groups_changed_ = false, holds_ = true;
    uid_t uid_ = 0;
    gid_t gid_ = 0;
    int dumpable_ = 0;
    std::vector<gid_t> groups_;
    uint64_t effective_ = 0;
  };

  bool foreign_ = false;
  FilePolicy policy_;
  uid_t uid_ = 0;
  gid_t gid_ = 0;
  std::vector<gid_t> groups_;
  uint64_t effective_ = 0;  // capabilities
};

}  // namespace vmckpt
