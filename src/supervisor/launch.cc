#include "supervisor/launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "core/elf_file.h"
#include "core/fd.h"
#include "core/proc.h"
#include "modules/seccomp.h"

namespace vmckpt {
namespace {

constexpr int kMaxInterpreters = 4;  // the kernel's own limit on #! chains is of that order

Result<std::string> find_in_path(const std::string& command) {
  if (command.find('/') != std::string::npos) {
    if (::access(command.c_str(), F_OK) != 0) {
      return errno_error("start " + command, errno == ENOENT ? "look at its name, and at the directory you are in" : "");
    }
    if (::access(command.c_str(), X_OK) != 0) return errno_error("start " + command, "make it executable");
    return command;
  }
  const char* path = std::getenv("PATH");
  std::string directories = path != nullptr ? path : "/usr/local/bin:/usr/bin:/bin";
  for (size_t start = 0; start <= directories.size();) {
    size_t end = std::min(directories.find(':', start), directories.size());
    std::string candidate = directories.substr(start, end - start);
    candidate += (candidate.empty() ? "./" : "/") + command;
    struct stat info {};
    if (::stat(candidate.c_str(), &info) == 0 && S_ISREG(info.st_mode) && ::access(candidate.c_str(), X_OK) == 0)
      return candidate;
    start = end + 1;
  }
  struct stat here {};
  const bool is_here = ::stat(command.c_str(), &here) == 0 && S_ISREG(here.st_mode);
  return error(fmt::format("start {}: it is in no directory of PATH", command),
               is_here ? fmt::format("the one in this directory is ./{}", command) : "give its path, or install it");
}

Result<void> check_elf(const std::string& path, int fd) {
  ElfFile program = VMCKPT_TRY(ElfFile::open(fd, path));
  if (!program.is_64_bit_x86()) return error(path + " is no 64-bit x86 program: only those can be checkpointed");
  const std::string interpreter = VMCKPT_TRY(program.interpreter());
  // The recorder is linked against glibc and loaded by its dynamic linker.
  for (const char* other : {"ld-musl", "linker64", "ld-uClibc"}) {
    if (interpreter.find(other) == std::string::npos) continue;
    return error(fmt::format("{} is linked against another C library than glibc (its interpreter is {}): the recorder cannot be "
                             "loaded into it", path, interpreter),
                 "use a build of it for glibc");
  }
  if (interpreter.empty()) {
    // Go's linker notes the program's build id under its own name (cmd/link, ELFNOTE_GO_NAME).
    const std::vector<ElfNote> notes = program.notes();
    const bool go = std::any_of(notes.begin(), notes.end(), [](const ElfNote& note) { return note.owner == "Go"; });
    return error(path + " is statically linked: the recorder, a preloaded library, cannot be in it",
                 go ? "build it with `go build -buildmode=pie`" : "use a dynamically linked build of it");
  }
  return {};
}

Result<void> check_privileges(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return errno_error("examine " + path);
  const bool gains_user = (info.st_mode & S_ISUID) && info.st_uid != ::geteuid();
  const bool gains_group = (info.st_mode & S_ISGID) && (info.st_mode & S_IXGRP) && info.st_gid != ::getegid();
  const bool gains_capabilities = ::geteuid() != 0 && ::getxattr(path.c_str(), "security.capability", nullptr, 0) > 0;
  if (gains_user || gains_group) {
    return error(path + " is a set-uid or set-gid program: the kernel forbids its user to trace it, so it cannot be checkpointed",
                 "run vmckpt as the user that the program becomes");
  }
  if (gains_capabilities) {
    return error(path + " has file capabilities: the kernel forbids its user to trace it, so it cannot be checkpointed",
                 "run vmckpt as root, or use a copy of the program without them");
  }
  return {};
}

Result<void> check_ptrace_allowed() {
  auto scope = read_whole_file("/proc/sys/kernel/yama/ptrace_scope");
  if (!scope.ok()) return {};  // no Yama
  int64_t level = parse_number(*scope);
  if (level >= 3) return error("this host forbids ptrace altogether (Yama ptrace_scope is 3)", "only a reboot changes that");
  if (level == 2 && ::geteuid() != 0) {
    return error("this host lets only root use ptrace (Yama ptrace_scope is 2)", "sysctl kernel.yama.ptrace_scope=1");
  }
  return {};
}

void set_preload(const std::string& recorder) {
  const char* others = std::getenv("LD_PRELOAD");
  std::string value = recorder;
  if (others != nullptr && *others != '\0' && std::string(others).find(recorder) == std::string::npos)
    value += std::string(":") + others;
  ::setenv("LD_PRELOAD", value.c_str(), 1);
}

// A dynamically linked ASan runtime insists on being the first library, before the recorder. It works as well behind it, and the
// target may execute such a program later: so the check goes, not the order (compiler-rt, asan_linux.cpp).
void allow_sanitizer_runtimes() {
  constexpr char kOption[] = "verify_asan_link_order=0";
  const char* others = std::getenv("ASAN_OPTIONS");
  std::string value = others != nullptr && *others != '\0' ? std::string(others) + ":" + kOption : kOption;
  ::setenv("ASAN_OPTIONS", value.c_str(), 1);
}

}  // namespace

Result<std::string> find_recorder() {
  std::filesystem::path own = VMCKPT_TRY(read_link("/proc/self/exe"));
  const std::filesystem::path folder = own.parent_path();
  for (const char* place : {"libvmckpt.so", "../lib/vmckpt/libvmckpt.so", "../lib/x86_64-linux-gnu/vmckpt/libvmckpt.so"}) {
    std::error_code missing;
    auto candidate = std::filesystem::canonical(folder / place, missing);
    if (!missing) return candidate.string();
  }
  return error("the recorder libvmckpt.so is not beside " + own.string(), "install vmckpt again");
}

Result<void> check_program(const std::string& command) {
  VMCKPT_TRY(check_ptrace_allowed());
  std::string path = VMCKPT_TRY(find_in_path(command));
  for (int depth = 0; depth < kMaxInterpreters; ++depth) {
    VMCKPT_TRY(check_privileges(path));
    auto fd = open_file(path, O_RDONLY);
    if (!fd.ok()) return {};  // executable but not readable: exec decides
    char start[256] = {};
    ssize_t got = ::pread(fd->get(), start, sizeof start - 1, 0);
    if (std::string_view(start).starts_with("\177ELF")) return check_elf(path, fd->get());
    if (got < 2 || start[0] != '#' || start[1] != '!') return {};  // exec says what it is
    auto words = split_words(std::string_view(start + 2).substr(0, std::strcspn(start + 2, "\n")));
    if (words.empty()) return {};
    path = std::string(words.front());
    if (::access(path.c_str(), X_OK) != 0) return {};
  }
  return {};
}

Result<pid_t> start_program(const LaunchOptions& options, const sigset_t& mask) {
  std::string recorder = VMCKPT_TRY(find_recorder());
  FilterProgram filter;
  if (options.filter) filter = VMCKPT_TRY(make_launch_filter());
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe");
  Fd failed_read(ends[0]), failed_write(ends[1]);
  pid_t pid = ::fork();
  if (pid < 0) return errno_error("start a process");
  if (pid == 0) {
    set_preload(recorder);
    allow_sanitizer_runtimes();
    if (options.allow_devices) ::setenv("VMCKPT_ALLOW_DEVICES", "1", 1);
    std::vector<char*> argv;
    for (const std::string& word : options.command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    Result<void> filtered = options.filter ? install_filter(filter) : Result<void>();
    ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
    std::string text;
    if (filtered.ok()) {
      ::execvp(argv[0], argv.data());
      text = errno_error("start " + options.command[0]).message();
    } else {
      text = filtered.error().message();
    }
    (void)!::write(failed_write.get(), text.data(), text.size());
    ::_exit(127);
  }
  failed_write.reset();
  std::string failure = VMCKPT_TRY(read_whole_fd(failed_read.get(), "the new process"));
  if (!failure.empty()) return error(failure);
  return pid;
}

}  // namespace vmckpt
