// Whose the files are that restart finds: what another user has put in the place of one is not taken for it.
#pragma once

#include <string>

#include <sys/types.h>

#include "core/result.h"
#include "image/memory.pb.h"

namespace vmckpt {

class FileAccess;

// Whether `now` is the owner that the file had, `then`. In a user namespace made for the restart most users have no number:
// there one that has none counts as any of these (the preflight, outside, knew better).
bool is_same_owner(uid_t then, uid_t now);
// The same; true where nothing is known of `then`.
bool is_same_owner(const pb::Inode& then, uid_t now);

// What to say, and to do, about a file of another user's: with EPERM.
Error another_users(const std::string& path, const pb::Inode& then, uid_t now);

// Whether the content of a file may be given to the target again: its rights are restart's own, or the file is its own.
bool may_have_content(const FileAccess& access, const pb::Inode& then);

}  // namespace vmckpt
