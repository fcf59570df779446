// The vmckpt command: one verb, one file.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"

namespace {

struct VerbEntry {
  const char* name;
  int (*run)(int, char**);
  const char* summary;
};

constexpr VerbEntry kVerbs[] = {
    {"launch", vmckpt::cmd_launch, "start a program so that it can be checkpointed"},
    {"checkpoint", vmckpt::cmd_checkpoint, "write an image of a running target"},
    {"restart", vmckpt::cmd_restart, "restart a target from an image"},
    {"list", vmckpt::cmd_list, "list running and recently ended targets"},
    {"attach", vmckpt::cmd_attach, "connect to the terminal of a detached target"},
    {"logs", vmckpt::cmd_logs, "print the output of a detached target"},
    {"stop", vmckpt::cmd_stop, "terminate a target with SIGTERM, then with SIGKILL if needed"},
    {"kill", vmckpt::cmd_kill, "kill a target immediately"},
    {"inspect", vmckpt::cmd_inspect, "show the contents of an image"},
    {"verify", vmckpt::cmd_verify, "check an image's checksums and structure"},
    {"doctor", vmckpt::cmd_doctor, "report what this host can and cannot do"},
};

void print_usage(FILE* to) {
  std::fputs("usage: vmckpt VERB [OPTION...]\n\n", to);
  for (const VerbEntry& verb : kVerbs) std::fprintf(to, "  %-12s %s\n", verb.name, verb.summary);
  std::fprintf(to, "  %-12s %s\n  %-12s %s\n", "help [VERB]", "print this help, or the help of a verb", "version",
               "print the version");
  std::fputs("\nRun vmckpt VERB --help for details.\n", to);
}

int no_such_verb(const char* name) {
  std::fprintf(stderr, "vmckpt: unknown verb \"%s\"\n", vmckpt::printable(name).c_str());
  print_usage(stderr);
  return 2;
}

constexpr const char* kNoMemory = "there is not enough memory for this";
constexpr const char* kNoMemoryCure = "free some, or raise `ulimit -v`";

std::terminate_handler default_terminate = std::abort;

// Where an exception cannot be caught (a destructor that needs memory, as those of JSON do). Other than want of memory is a bug.
[[noreturn]] void tell_want_of_memory() {
  try {
    if (std::current_exception() != nullptr) throw;
  } catch (const std::bad_alloc&) {
    ::dprintf(STDERR_FILENO, "vmckpt: %s; %s\n", kNoMemory, kNoMemoryCure);
    ::_exit(vmckpt::kExitFailed);
  } catch (...) {
  }
  default_terminate();
  std::abort();
}

// Failures are values; what comes as an exception is want of memory, or a mistake of vmckpt's.
int run(const VerbEntry& verb, int argc, char** argv) {
  const vmckpt::Verb failed{verb.name, "", ""};
  default_terminate = std::set_terminate(tell_want_of_memory);
  try {
    return verb.run(argc, argv);
  } catch (const std::bad_alloc&) {
    return vmckpt::fail(failed, vmckpt::error(kNoMemory, kNoMemoryCure));
  } catch (const std::exception& problem) {
    const std::string what = fmt::format("something unexpected happened ({})", problem.what());
    return vmckpt::fail(failed, vmckpt::error(what, "please report this"));
  }
}

int help(int argc, char** argv) {
  if (argc < 3) {
    print_usage(stdout);
    return 0;
  }
  char option[] = "--help";
  char* words[] = {argv[2], option, nullptr};
  for (const VerbEntry& verb : kVerbs) {
    if (std::strcmp(argv[2], verb.name) == 0) return run(verb, 2, words);
  }
  return no_such_verb(argv[2]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    print_usage(stderr);
    return 2;
  }
  for (const VerbEntry& verb : kVerbs) {
    if (std::strcmp(argv[1], verb.name) == 0) return run(verb, argc - 1, argv + 1);
  }
  if (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0 || std::strcmp(argv[1], "help") == 0)
    return help(argc, argv);
  if (std::strcmp(argv[1], "--version") == 0 || std::strcmp(argv[1], "version") == 0) {
    std::printf("vmckpt %s\n", VMCKPT_VERSION);
    return 0;
  }
  return no_such_verb(argv[1]);
}
