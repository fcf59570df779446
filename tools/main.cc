// The vmckpt command: one verb, one file.
#include <cstdio>
#include <cstring>

#include "commands.h"

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
    {"list", vmckpt::cmd_list, "show the running targets"},
    {"inspect", vmckpt::cmd_inspect, "show what an image holds"},
    {"verify", vmckpt::cmd_verify, "check an image's checksums and structure"},
    {"doctor", vmckpt::cmd_doctor, "tell what this host can and cannot do"},
};

void print_usage(FILE* to) {
  std::fputs("usage: vmckpt VERB [OPTION...]\n\n", to);
  for (const VerbEntry& verb : kVerbs) std::fprintf(to, "  %-12s %s\n", verb.name, verb.summary);
  std::fputs("\nvmckpt VERB --help tells more.\n", to);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    print_usage(stderr);
    return 2;
  }
  for (const VerbEntry& verb : kVerbs) {
    if (std::strcmp(argv[1], verb.name) == 0) return verb.run(argc - 1, argv + 1);
  }
  if (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0 || std::strcmp(argv[1], "help") == 0) {
    print_usage(stdout);
    return 0;
  }
  if (std::strcmp(argv[1], "--version") == 0) {
    std::printf("vmckpt %s\n", VMCKPT_VERSION);
    return 0;
  }
  std::fprintf(stderr, "vmckpt: there is no verb \"%s\"\n", argv[1]);
  print_usage(stderr);
  return 2;
}
