#include "supervisor/fault_point.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#include <signal.h>
#include <unistd.h>

namespace vmckpt {

void fault_point(const char* name) {
  static const char* const wanted = std::getenv("VMCKPT_FAULT");
  if (wanted == nullptr) return;
  if (wanted == std::string("kill:") + name) ::kill(::getpid(), SIGKILL);
  if (wanted == std::string("pause:") + name) ::sleep(30);
  if (wanted == std::string("wait:") + name) {  // for a file, half a minute at most
    std::fprintf(stderr, "fault point %s\n", name);
    const char* const go = std::getenv("VMCKPT_FAULT_GO");
    for (int i = 0; i < 30'000 && go != nullptr && ::access(go, F_OK) != 0; ++i) ::usleep(1000);
  }
}

}  // namespace vmckpt
