// Room: disk, memory, limits.
#include <cstdio>
#include <sstream>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "core/fd.h"
#include "supervisor/doctor_probes.h"

namespace vmckpt {

Probe probe_image_dir(const std::string& image_dir) {
  const std::string elsewhere = "choose another image directory with launch -d";
  constexpr off_t kDataAt = 32 * kMiB;
  constexpr off_t kFileBytes = 64 * kMiB;
  bool unnamed = true;
  Fd file(::open(image_dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!file && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
    unnamed = false;
    std::string name = image_dir + "/.vmckpt-doctor-XXXXXX";
    file = Fd(::mkostemp(name.data(), O_CLOEXEC));
    if (file) ::unlink(name.c_str());
  }
  if (!file) return missing(why(errno_error("create a file in " + image_dir)), elsewhere);
  std::string page(kPageBytes, 'x');
  Result<void> written = pwrite_exactly(file.get(), page.data(), page.size(), kDataAt, "a file in " + image_dir);
  if (!written || ::ftruncate(file.get(), kFileBytes) < 0) {
    return missing(why(written ? errno_error("ftruncate") : written.error()), elsewhere);
  }
  ::fdatasync(file.get());
  struct stat status;
  ::fstat(file.get(), &status);

  // Restart maps memory from the image, and generated code in it must stay executable.
  for (int protection : {PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC}) {
    void* at = ::mmap(nullptr, kPageBytes, protection, MAP_PRIVATE, file.get(), kDataAt);
    if (at == MAP_FAILED) {
      Error reason = errno_error(fmt::format("map a file in {}", image_dir));
      if ((protection & PROT_EXEC) == 0) return missing(why(reason), elsewhere);
      return limited(why(reason) + ": programs that generate code, such as QEMU, cannot be restarted from there",
                     "remount it without noexec, or " + elsewhere);
    }
    ::munmap(at, kPageBytes);
  }
  if (static_cast<int64_t>(status.st_blocks) * 512 > kFileBytes / 2 || ::lseek(file.get(), 0, SEEK_HOLE) != 0) {
    return limited(image_dir + " does not support holes: zero pages take space in images", elsewhere);
  }
  if (!unnamed)
    return limited(image_dir + " does not support unnamed files: a killed checkpoint leaves a .NAME.tmp-* file behind");
  return ok(image_dir + " supports holes and unnamed files");
}

Probe probe_free_disk(const std::string& image_dir) {
  struct statvfs status;
  if (::statvfs(image_dir.c_str(), &status) < 0) return missing(why(errno_error("statvfs " + image_dir)));
  uint64_t free_mib = uint64_t{status.f_bavail} * status.f_frsize / kMiB;
  if (free_mib < 1024) return limited(fmt::format("only {} MiB are free in {}", free_mib, image_dir), "free some space");
  return ok(fmt::format("{} MiB are free in {}", free_mib, image_dir));
}

Probe probe_overcommit() {
  const std::string mode = read_line("/proc/sys/vm/overcommit_memory");
  if (mode != "2")
    return ok("vm.overcommit_memory is " + (mode.empty() ? "unknown" : mode) + ": fork needs no spare memory");
  uint64_t limit_kib = 0, used_kib = 0;
  Result<std::string> meminfo = read_whole_file("/proc/meminfo", kMiB);
  std::istringstream lines(meminfo ? *meminfo : std::string());
  for (std::string line; std::getline(lines, line);) {
    std::sscanf(line.c_str(), "CommitLimit: %lu kB", &limit_kib);
    std::sscanf(line.c_str(), "Committed_AS: %lu kB", &used_kib);
  }
  uint64_t left_mib = limit_kib > used_kib ? (limit_kib - used_kib) / 1024 : 0;
  return limited(
      fmt::format("vm.overcommit_memory is 2: programs with more than {} MiB of private memory cannot be forked "
                  "for a checkpoint",
                  left_mib),
      "sysctl vm.overcommit_memory=0");
}

Probe probe_huge_pages() {
  const std::string enabled = read_line("/sys/kernel/mm/transparent_hugepage/enabled");
  if (enabled.find("[always]") != std::string::npos)
    return ok("transparent huge pages are enabled: forks of large programs are fast");
  if (enabled.find("[madvise]") != std::string::npos) {
    return ok("transparent huge pages are available to programs that request them, such as QEMU");
  }
  return limited("transparent huge pages are not available: the pause of programs with a lot of memory is longer",
                 "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
}

Probe probe_limits() {
  struct Limit {
    int resource;
    const char* name;
    const char* option;
    rlim_t least;
  };
  static constexpr Limit kLimits[] = {{RLIMIT_FSIZE, "file size", "-f", RLIM_INFINITY},
                                      {RLIMIT_AS, "address space", "-v", RLIM_INFINITY},
                                      {RLIMIT_NPROC, "processes", "-u", 64},
                                      {RLIMIT_NOFILE, "open files", "-n", 1024}};
  std::string low, cure;
  for (const Limit& limit : kLimits) {
    rlimit now{};
    ::getrlimit(static_cast<__rlimit_resource_t>(limit.resource), &now);
    if (now.rlim_cur >= limit.least) continue;
    low += fmt::format("{}{} {}", low.empty() ? "" : ", ", limit.name, now.rlim_cur);
    cure += fmt::format("{}ulimit {}", cure.empty() ? "raise with " : ", ", limit.option);
  }
  if (low.empty()) return ok("resource limits are sufficient");
  return limited("low limits: " + low, cure);
}

}  // namespace vmckpt
