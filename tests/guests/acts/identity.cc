// What a process is, as it sees itself and as /proc shows it: pid, process group and session of its own, credentials,
// working directory, umask, limits, arguments, environment, executable, auxiliary vector.

#include <grp.h>
#include <sys/auxv.h>
#include <sys/resource.h>

#include "act.h"

static const char* const kStatusFields[] = {"Name",   "Umask",  "Tgid",   "Uid",    "Gid",       "Groups",
                                            "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs"};

struct Identity {
  pid_t pid, group, session;
  std::string cwd, root, exe, command_line, environment, auxiliary_vector, comm;
  std::vector<std::string> status;
  rlimit limits[RLIM_NLIMITS];
};

static Identity current() {
  Identity self{};
  self.pid = getpid();
  self.group = getpgrp();
  self.session = getsid(0);
  self.cwd = act::link_text("/proc/self/cwd");
  self.root = act::link_text("/proc/self/root");
  self.exe = act::link_text("/proc/self/exe");
  self.command_line = act::file_text("/proc/self/cmdline");
  self.environment = act::file_text("/proc/self/environ");
  self.auxiliary_vector = act::file_text("/proc/self/auxv");
  self.comm = act::file_text("/proc/self/comm");
  for (const char* field : kStatusFields) self.status.push_back(act::status_field("/proc/self/status", field));
  for (unsigned resource = 0; resource < RLIM_NLIMITS; resource++) MUST(getrlimit(resource, &self.limits[resource]));
  return self;
}

static void lower(int resource, rlim_t soft, rlim_t hard) {
  rlimit limit;
  MUST(getrlimit(resource, &limit));
  limit.rlim_max = std::min(limit.rlim_max, hard);
  limit.rlim_cur = std::min(limit.rlim_max, soft);
  MUST(setrlimit(resource, &limit));
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  setsid();  // fails where we lead a group already: then group and pid are equal all the same
  MUST(mkdir("a working directory", 0755));
  MUST(chdir("a working directory"));
  umask(0137);
  MUST(setenv("ACT_SET_LATER", "in the heap, not in /proc/self/environ", 1));
  lower(RLIMIT_NOFILE, 200, 300);
  lower(RLIMIT_CORE, 0, 4096);
  lower(RLIMIT_STACK, 4 << 20, RLIM_INFINITY);
  lower(RLIMIT_NPROC, 20000, 20000);
  lower(RLIMIT_SIGPENDING, 111, 222);
  Identity before = current();

  act::intermission();

  Identity after = current();
  act::expect_equal("pid", before.pid, after.pid);
  if (before.group == before.pid) act::expect_equal("process group", before.group, after.group);
  if (before.session == before.pid) act::expect_equal("session", before.session, after.session);
  act::expect_equal("cwd", before.cwd, after.cwd);
  act::expect_equal("root", before.root, after.root);
  act::expect_equal("exe", before.exe, after.exe);
  act::expect_equal("arguments", before.command_line, after.command_line);
  act::expect_equal("environment", before.environment, after.environment);
  act::expect("auxiliary vector", before.auxiliary_vector == after.auxiliary_vector);
  act::expect_equal("comm", before.comm, after.comm);
  for (size_t i = 0; i < std::size(kStatusFields); i++) {
    act::expect_equal(std::string("status ") + kStatusFields[i], before.status[i], after.status[i]);
  }
  for (size_t resource = 0; resource < RLIM_NLIMITS; resource++) {
    std::string name = "limit " + std::to_string(resource);
    act::expect_equal(name + " soft", before.limits[resource].rlim_cur, after.limits[resource].rlim_cur);
    act::expect_equal(name + " hard", before.limits[resource].rlim_max, after.limits[resource].rlim_max);
  }
  act::expect_equal("a variable set by the program", std::string("in the heap, not in /proc/self/environ"),
                    std::string(getenv("ACT_SET_LATER")));
  act::expect_equal("AT_SECURE", 0u, getauxval(AT_SECURE));
  return act::finish();
}
