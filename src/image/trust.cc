#include "image/trust.h"

#include <sys/stat.h>
#include <unistd.h>

namespace vmckpt {

Result<void> check_image_trusted(int fd, const std::string& path) {
  struct stat status;
  if (::fstat(fd, &status) < 0) return errno_error("look at image " + path);
  if (status.st_uid != ::geteuid() && status.st_uid != 0) {
    return error(fmt::format("image {} belongs to user {}, you are user {}: it would run with your rights", path,
                             status.st_uid, ::geteuid()),
                 "restart it as that user, or make a copy of your own if you trust it");
  }
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return error(fmt::format("image {} can be written by others (mode {:#o}): it would run with your rights", path,
                             status.st_mode & 07777),
                 fmt::format("chmod 600 {} if you trust it", path));
  }
  return {};
}

}  // namespace vmckpt
