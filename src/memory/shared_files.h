// Files that have a path and are the memory of a shared mapping (POSIX shared memory, a VMM's RAM): their content is in the
// image, as that of a CapturedFile with a path, and is put back into the file at restart. What is in the file by then may be
// somebody else's, so the rule is strict: a file that is missing is made again; one that is there gets the content back only if
// it is the same file (device and inode), has its size, and no other process has it open or mapped. Otherwise restart is refused,
// and the user says which content is to stay.
//
// Small files on disk that are mapped for writing are kept in the image, too (KEPT, with a path): some are temporary ones, that
// somebody removes when their owner has gone (a JVM's hsperfdata). Such a file is made again where it is missing, and otherwise
// is left as it is.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "core/fd.h"
#include "core/result.h"
#include "image/image.pb.h"

namespace vmckpt {

class FileAccess;

// At a restart.
enum class SharedFiles {
  kRestore,    // by the rule
  kOverwrite,  // the image's content, whatever is there
  kLeave,      // what is in the file now
};

// Preflight: says what stands in the way.
void check_shared_files(const pb::Image& image, const FileAccess& access, std::vector<Error>& problems,
                        std::vector<std::string>& notes);

// Whether restart writes the image's content into the file, or into another one in its place.
bool is_put_back(const pb::CapturedFile& file, const FileAccess& access);
// The files that the image brings along, so that they need not be there.
std::set<std::string> paths_put_back(const pb::Image& image, const FileAccess& access);

// Restart, in the new process: the file, open for reading and writing. Under kLeave as it is, otherwise with the saved size and
// empty, to be filled.
Result<Fd> open_shared_file(const pb::CapturedFile& file, const FileAccess& access);

}  // namespace vmckpt
