// A privileged program that gave up privileges does not get them back: dropped bounding set entries, an emptied
// effective set, securebits. The ordinary user has none to begin with, and gets none.

#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/prctl.h>

#include "act.h"

static const char* const kSets[] = {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"};

static std::vector<std::string> capability_sets() {
  std::vector<std::string> sets;
  for (const char* name : kSets) sets.push_back(act::status_field("/proc/self/status", name));
  return sets;
}

static void give_up_most() {
  for (int capability : {CAP_SYS_TIME, CAP_SYS_BOOT, CAP_MKNOD}) MUST(prctl(PR_CAPBSET_DROP, capability, 0, 0, 0));
  MUST(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NO_SETUID_FIXUP, 0, 0, 0));
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct sets[2]{};
  sets[0].permitted = 1u << CAP_KILL | 1u << CAP_CHOWN;
  sets[0].effective = 1u << CAP_KILL;
  MUST(syscall(SYS_capset, &header, sets));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  bool privileged = geteuid() == 0;
  if (privileged) give_up_most();
  MUST(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));  // losing capabilities cleared it, and with it the right to be traced
  auto before = capability_sets();
  int securebits = MUST(prctl(PR_GET_SECUREBITS, 0, 0, 0, 0));

  act::intermission();

  auto after = capability_sets();
  for (size_t i = 0; i < std::size(kSets); i++) {
    // An ordinary user's restart makes a user namespace, whose bounding set is its own.
    if (!privileged && std::string(kSets[i]) == "CapBnd") continue;
    act::expect_equal(kSets[i], before[i], after[i]);
  }
  act::expect_equal("securebits", securebits, prctl(PR_GET_SECUREBITS, 0, 0, 0, 0));
  return act::finish();
}
