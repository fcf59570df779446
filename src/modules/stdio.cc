// Numbers 0 to 2 that led to the outside (a pipe, a connection, a terminal): restart's own stdin, stdout and stderr
// take their place, like in any program that a shell starts.
//
// A pipe or terminal is opened again through /proc/self/fd, so that flags such as O_NONBLOCK are the target's own;
// where that is not allowed (the file belongs to another user), and for everything else, it is a duplicate, as it would
// be after launch.
#include <unistd.h>

#include "modules/descriptor_module.h"

namespace vmckpt {

Result<Fd> reopen(int fd, int flags) {
  std::string path = fmt::format("/proc/self/fd/{}", fd);
  return open_file(path, flags | O_NOCTTY);
}

Result<Fd> attach_stdio(RestoreContext& context, const pb::OpenFile& file, int number) {
  if (number < 0 || number > 2)
    return error(describe(file) + " is none of the first three, whose place restart's own could take");
  int outside = context.restore.stdio[static_cast<size_t>(number)];
  struct stat status;
  if (outside < 0 || ::fstat(outside, &status) != 0) {
    context.note(
        fmt::format("{} was connected to the outside; restart has no descriptor {} to put there: it is /dev/null now",
                    describe(file), number));
    return open_file("/dev/null", O_RDWR);
  }
  if (S_ISFIFO(status.st_mode) || ::isatty(outside)) {
    int access = static_cast<int>(file.status_flags() & (O_ACCMODE | O_NONBLOCK));
    // A pipe can be opened either way, but each of its ends must stay what it is.
    if (S_ISFIFO(status.st_mode)) access = (access & ~O_ACCMODE) | (::fcntl(outside, F_GETFL) & O_ACCMODE);
    if (auto fresh = reopen(outside, access | O_NONBLOCK); fresh.ok()) return fresh;
  }
  context.shared_with_restart.insert(file.id());
  int fd = ::fcntl(outside, F_DUPFD_CLOEXEC, context.restore.first_service_fd);
  if (fd < 0) return errno_error(fmt::format("{}: attach to descriptor {} of restart", describe(file), number));
  return Fd(fd);
}

}  // namespace vmckpt
