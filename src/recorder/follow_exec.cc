// Keeps the recorder in programs that the target executes: where the new environment lacks LD_PRELOAD with this library, it
// is added (env -i, sudo-like cleaners, explicit envp). fork, vfork and posix_spawn children inherit the environment. So they do
// system call filters and Landlock's rules, which is told by further variables (kLockedIn, kLandlocked).
//
// No allocation: the new environment lives on the stack of the wrapper until the exec.
#include <cerrno>
#include <cstdarg>
#include <cstddef>

#include <alloca.h>
#include <dlfcn.h>
#include <spawn.h>
#include <unistd.h>

#include "recorder/recorder.h"

namespace vmckpt {

static char g_preload[4096 + 16];  // "LD_PRELOAD=/path/libvmckpt.so"
static const char* g_library = nullptr;

static size_t length_of(const char* text) { return __builtin_strlen(text); }

__attribute__((constructor(102))) static void find_own_path() {
  static constexpr char kName[] = "LD_PRELOAD=";
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&find_own_path), &info) == 0 || info.dli_fname == nullptr) return;
  size_t length = length_of(info.dli_fname);
  if (length + sizeof kName > sizeof g_preload) return;
  __builtin_memcpy(g_preload, kName, sizeof kName - 1);
  __builtin_memcpy(g_preload + sizeof kName - 1, info.dli_fname, length + 1);
  g_library = g_preload + sizeof kName - 1;
}

static bool starts_with(const char* text, const char* prefix) {
  while (*prefix != '\0') {
    if (*text++ != *prefix++) return false;
  }
  return true;
}

static bool contains(const char* text, const char* part) {
  for (; *text != '\0'; ++text) {
    if (starts_with(text, part)) return true;
  }
  return false;
}

struct EnvironmentNeed {
  size_t entries = 0;
  char* const* preload = nullptr;  // an LD_PRELOAD entry without this library
  bool has_library = false;
  bool tells_lock = false;
  bool tells_landlock = false;

  bool complete() const { return has_library && tells_lock && tells_landlock; }
};

static EnvironmentNeed examine(char* const* environment) {
  EnvironmentNeed need;
  need.has_library = g_library == nullptr;
  need.tells_lock = !is_locked_in();
  need.tells_landlock = !is_landlocked();
  for (; environment != nullptr && environment[need.entries] != nullptr; ++need.entries) {
    if (starts_with(environment[need.entries], kLockedIn)) need.tells_lock = true;
    if (starts_with(environment[need.entries], kLandlocked)) need.tells_landlock = true;
    if (!starts_with(environment[need.entries], "LD_PRELOAD=")) continue;
    if (g_library != nullptr && contains(environment[need.entries], g_library)) need.has_library = true;
    else need.preload = &environment[need.entries];
  }
  return need;
}

// `to` has room for entries + 4 pointers, `text` for the joined LD_PRELOAD.
static void complete_environment(char* const* from, const EnvironmentNeed& need, char** to, char* text) {
  size_t used = 0;
  for (size_t i = 0; i < need.entries; ++i) {
    if (need.has_library || &from[i] != need.preload) to[used++] = from[i];
  }
  if (!need.tells_lock) to[used++] = const_cast<char*>(kLockedIn);
  if (!need.tells_landlock) to[used++] = const_cast<char*>(kLandlocked);
  if (need.has_library) {
    to[used] = nullptr;
    return;
  }
  size_t length = length_of(g_preload);
  __builtin_memcpy(text, g_preload, length + 1);
  if (need.preload != nullptr) {
    text[length] = ':';
    const char* others = *need.preload + sizeof "LD_PRELOAD=" - 1;
    __builtin_memcpy(text + length + 1, others, length_of(others) + 1);
  }
  to[used++] = text;
  to[used] = nullptr;
}

}  // namespace vmckpt

using namespace vmckpt;

// Declares `complete`, an environment in which the recorder is preloaded, on the calling function's stack.
#define COMPLETE_ENVIRONMENT(environment)                                                                          \
  EnvironmentNeed need = examine(environment);                                                                     \
  char* const* complete = environment;                                                                             \
  if (!need.complete()) {                                                                                          \
    char** entries = static_cast<char**>(alloca((need.entries + 4) * sizeof(char*)));                              \
    char* text = static_cast<char*>(                                                                               \
        alloca(length_of(g_preload) + 2 + (need.preload != nullptr ? length_of(*need.preload) : 0)));              \
    complete_environment(environment, need, entries, text);                                                        \
    complete = entries;                                                                                            \
  }

EXPORT int execve(const char* path, char* const argv[], char* const environment[]) noexcept {
  REAL(execve);
  COMPLETE_ENVIRONMENT(environment)
  return real(path, argv, complete);
}

EXPORT int fexecve(int fd, char* const argv[], char* const environment[]) noexcept {
  REAL(fexecve);
  COMPLETE_ENVIRONMENT(environment)
  return real(fd, argv, complete);
}

EXPORT int execvpe(const char* file, char* const argv[], char* const environment[]) noexcept {
  REAL(execvpe);
  COMPLETE_ENVIRONMENT(environment)
  return real(file, argv, complete);
}

EXPORT int execv(const char* path, char* const argv[]) noexcept { return execve(path, argv, environ); }
EXPORT int execvp(const char* file, char* const argv[]) noexcept { return execvpe(file, argv, environ); }

// The argument lists of execl and its relatives, copied to the stack.
#define COLLECT_ARGUMENTS(first)                                              \
  va_list list;                                                               \
  size_t count = 1;                                                           \
  va_start(list, first);                                                      \
  while (va_arg(list, char*) != nullptr) ++count;                             \
  va_end(list);                                                               \
  char** argv = static_cast<char**>(alloca((count + 1) * sizeof(char*)));     \
  argv[0] = const_cast<char*>(first);                                         \
  va_start(list, first);                                                      \
  for (size_t i = 1; i <= count; ++i) argv[i] = va_arg(list, char*);

EXPORT int execl(const char* path, const char* first, ...) noexcept {
  COLLECT_ARGUMENTS(first)
  va_end(list);
  return execve(path, argv, environ);
}

EXPORT int execlp(const char* file, const char* first, ...) noexcept {
  COLLECT_ARGUMENTS(first)
  va_end(list);
  return execvpe(file, argv, environ);
}

EXPORT int execle(const char* path, const char* first, ...) noexcept {
  COLLECT_ARGUMENTS(first)
  char* const* environment = va_arg(list, char* const*);
  va_end(list);
  return execve(path, argv, environment);
}

EXPORT int posix_spawn(pid_t* pid, const char* path, const posix_spawn_file_actions_t* actions,
                       const posix_spawnattr_t* attributes, char* const argv[], char* const environment[]) {
  REAL(posix_spawn);
  COMPLETE_ENVIRONMENT(environment)
  return real(pid, path, actions, attributes, argv, complete);
}

EXPORT int posix_spawnp(pid_t* pid, const char* file, const posix_spawn_file_actions_t* actions,
                        const posix_spawnattr_t* attributes, char* const argv[], char* const environment[]) {
  REAL(posix_spawnp);
  COMPLETE_ENVIRONMENT(environment)
  return real(pid, file, actions, attributes, argv, complete);
}
