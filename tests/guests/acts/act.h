// What every three-act program shares.
//
//   act one        the program builds the state that its file name promises
//   intermission   it prints READY and polls for the file named by argv[1]; here it is checkpointed, and in the
//                  restarted variants also killed with SIGKILL and restarted from the image, once or twice
//   act three      it verifies everything, prints PASS or one FAIL line per difference, and exits 0 or 1
//
// A program does not know which variant it runs in: it must pass natively, resumed and restarted alike. It keeps its
// files in the current directory and must leave nothing behind that outlives a killed process (no System V segment
// that is not marked for removal, no child). A host that lacks what the program needs gets SKIP and status 77.

#pragma once

#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace act {

inline const char* go_file = nullptr;
inline std::vector<std::string> args;  // what follows the go file on the command line
inline int failures = 0;

inline void begin(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s GO_FILE [ARG...]\n", argv[0]);
    std::exit(2);
  }
  go_file = argv[1];
  args.assign(argv + 2, argv + argc);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
}

[[noreturn]] inline void skip(const std::string& missing) {
  std::printf("SKIP: %s\n", missing.c_str());
  std::exit(77);
}

inline int finish() {
  if (failures == 0) std::puts("PASS");
  std::fflush(stdout);
  return failures == 0 ? 0 : 1;
}

// ---- checks -------------------------------------------------------------------------------------------------------

inline std::string show(const std::string& value) { return "\"" + value + "\""; }
inline std::string show(const char* value) { return show(std::string(value)); }
inline std::string show(bool value) { return value ? "true" : "false"; }
template <typename T>
std::string show(const T& value) {
  if constexpr (std::is_pointer_v<T>) {
    char text[32];
    std::snprintf(text, sizeof text, "%p", static_cast<const volatile void*>(value));
    return text;
  } else {
    return std::to_string(value);
  }
}

inline void fail(const std::string& what, const std::string& expected, const std::string& got) {
  __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  std::printf("FAIL: %s, expected %s, got %s\n", what.c_str(), expected.c_str(), got.c_str());
}

template <typename E, typename G>
bool expect_equal(const std::string& what, const E& expected, const G& got) {
  bool same;
  if constexpr (std::is_integral_v<E> && std::is_integral_v<G> && !std::is_same_v<E, bool> &&
                !std::is_same_v<G, bool>) {
    same = std::cmp_equal(+expected, +got);  // the plus: char is no integer to cmp_equal
  } else {
    same = expected == got;
  }
  if (!same) fail(what, show(expected), show(got));
  return same;
}

inline bool expect(const std::string& what, bool holds) { return expect_equal(what, true, holds); }

// For a call that must fail with a certain errno; `result` is what the call returned.
inline void expect_errno(const std::string& what, int expected_errno, long result) {
  int got = result < 0 ? errno : 0;
  if (got != expected_errno) fail(what, strerror(expected_errno), got == 0 ? "success" : strerror(got));
}

// A call without which the act makes no sense: the program ends at once.
template <typename T>
T must(T result, const char* call) {
  bool failed;
  if constexpr (std::is_pointer_v<T>) {
    failed = result == nullptr || result == reinterpret_cast<T>(-1);
  } else {
    failed = result == static_cast<T>(-1);
  }
  if (failed) {
    std::printf("FAIL: %s, expected success, got %s\n", call, strerror(errno));
    std::exit(1);
  }
  return result;
}
#define MUST(call) ::act::must((call), #call)

// Root becomes an ordinary user for good, as a daemon does; its folder is one that the user may write to. Others stay who they
// are.
inline void drop_rights() {
  if (geteuid() != 0) return;
  MUST(chmod(".", 0777));
  gid_t group = 4242;
  MUST(setgroups(1, &group));
  MUST(setresgid(4242, 4242, 4242));
  MUST(setresuid(4242, 4242, 4242));
}

// The same for pthread_... functions, which return the error.
inline void must_zero(int error, const char* call) {
  if (error == 0) return;
  errno = error;
  must(-1, call);
}
#define MUST_ZERO(call) ::act::must_zero((call), #call)

// ---- time and the intermission ------------------------------------------------------------------------------------

inline int64_t now_ns(clockid_t clock = CLOCK_MONOTONIC) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline timespec to_timespec(int64_t ns) { return {ns / 1'000'000'000, ns % 1'000'000'000}; }

// Sleeps the full time even where the act's own signals arrive meanwhile.
inline void sleep_ms(int64_t ms) {
  timespec until = to_timespec(now_ns() + ms * 1'000'000);
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) == EINTR) {
  }
}

template <typename Predicate>
bool eventually(const std::string& what, Predicate holds, int64_t deadline_ms = 5000) {
  int64_t end_ns = now_ns() + deadline_ms * 1'000'000;
  while (!holds()) {
    if (now_ns() > end_ns) {
      fail(what, "within " + std::to_string(deadline_ms) + " ms", "not yet");
      return false;
    }
    sleep_ms(1);
  }
  return true;
}

inline void intermission() {
  std::puts("READY");
  std::fflush(stdout);
  timespec poll_interval = {0, 10'000'000};
  while (access(go_file, F_OK) != 0) nanosleep(&poll_interval, nullptr);
}

// ---- random data that can be made again from its seed -------------------------------------------------------------

inline uint64_t random_u64() {
  uint64_t value;
  if (getrandom(&value, sizeof value, 0) != sizeof value) std::abort();
  return value;
}

// splitmix64: one step, good enough that no page repeats.
inline uint64_t next_word(uint64_t& seed) {
  uint64_t z = (seed += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

inline void fill(void* start, size_t bytes, uint64_t seed) {
  auto* words = static_cast<uint64_t*>(start);
  for (size_t i = 0; i < bytes / 8; i++) words[i] = next_word(seed);
}

inline bool expect_filled(const std::string& what, const void* start, size_t bytes, uint64_t seed) {
  auto* words = static_cast<const uint64_t*>(start);
  for (size_t i = 0; i < bytes / 8; i++) {
    uint64_t expected = next_word(seed);
    if (words[i] != expected) {
      return expect_equal(what + " at byte " + std::to_string(i * 8), expected, words[i]);
    }
  }
  return true;
}

inline bool expect_zero(const std::string& what, const void* start, size_t bytes) {
  auto* words = static_cast<const uint64_t*>(start);
  for (size_t i = 0; i < bytes / 8; i++) {
    if (words[i] != 0) return expect_equal(what + " at byte " + std::to_string(i * 8), 0u, words[i]);
  }
  return true;
}

inline std::string random_text(size_t bytes) {
  std::string text(bytes, ' ');
  for (char& c : text) c = static_cast<char>('a' + random_u64() % 26);
  return text;
}

// ---- files --------------------------------------------------------------------------------------------------------

inline std::string file_text(const std::string& path) {
  std::string text;
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return "(cannot open " + path + ": " + strerror(errno) + ")";
  char buffer[4096];
  for (ssize_t got; (got = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(got));
  close(fd);
  return text;
}

inline void make_file(const std::string& path, const std::string& text) {
  int fd = MUST(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size())) MUST(-1);
  close(fd);
}

inline std::string link_text(const std::string& path) {
  char text[4096];
  ssize_t got = readlink(path.c_str(), text, sizeof text);
  return got < 0 ? std::string(strerror(errno)) : std::string(text, static_cast<size_t>(got));
}

inline std::string fd_link(int fd) { return link_text("/proc/self/fd/" + std::to_string(fd)); }

// Reads up to `bytes`, once; an error reads as its text.
inline std::string read_text(int fd, size_t bytes = 65536) {
  std::string text(bytes, '\0');
  ssize_t got = read(fd, text.data(), bytes);
  if (got < 0) return std::string("(") + strerror(errno) + ")";
  text.resize(static_cast<size_t>(got));
  return text;
}

inline ssize_t write_text(int fd, const std::string& text) { return write(fd, text.data(), text.size()); }

// The value of "Key:\tvalue" in /proc/self/status and its like.
inline std::string status_field(const std::string& path, const std::string& key) {
  std::string text = "\n" + file_text(path);
  size_t at = text.find("\n" + key + ":");
  if (at == std::string::npos) return "(no " + key + ")";
  at = text.find_first_not_of(" \t", at + key.size() + 2);
  return text.substr(at, text.find('\n', at) - at);
}

// ---- the memory map -----------------------------------------------------------------------------------------------

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

struct MapLine {
  uintptr_t start = 0, end = 0;
  std::string permissions, name, vm_flags;  // vm_flags only from /proc/self/smaps
};

inline MapLine map_line_at(const volatile void* address, const char* proc_file = "/proc/self/maps") {
  auto wanted = reinterpret_cast<uintptr_t>(address);
  MapLine found;
  for (const std::string& line : lines_of(file_text(proc_file))) {
    unsigned long start, end;
    char permissions[8];
    int name_at = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx %7s %*s %*s %*s %n", &start, &end, permissions, &name_at) >= 3) {
      if (found.start != 0) break;
      if (start <= wanted && wanted < end) found = {start, end, permissions, line.substr(name_at), ""};
    } else if (found.start != 0 && line.rfind("VmFlags: ", 0) == 0) {
      found.vm_flags = line.substr(9);
    }
  }
  return found;
}

inline std::string permissions_at(const volatile void* address) { return map_line_at(address).permissions; }

inline bool has_vm_flag(const volatile void* address, const char* flag) {
  return (" " + map_line_at(address, "/proc/self/smaps").vm_flags + " ").find(" " + std::string(flag) + " ") !=
         std::string::npos;
}

// ---- children -----------------------------------------------------------------------------------------------------

// Runs `body` in a forked child; its result is the child's exit status. Used in act three to look at things from
// another process (locks, MADV_DONTFORK, shared memory). 128+N when a signal ended the child.
template <typename Body>
int in_child(Body body) {
  std::fflush(stdout);
  pid_t child = MUST(fork());
  if (child == 0) _exit(body());
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace act
