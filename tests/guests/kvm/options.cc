// SPDX-License-Identifier: Apache-2.0

#include "options.h"

#include <getopt.h>

#include <cstdio>
#include <cstdlib>
#include <map>

namespace tiny {
namespace {

[[noreturn]] void usage(const char* name) {
  std::fprintf(stderr,
               "usage: %s --guest=FILE --go=FILE [--vcpus=N] [--irqchip=none|split|full] [--start-all] [--spare]\n"
               "       [--dont-fork] [--eventfds] [--coalesced] [--duplicates] [--signal-mask]\n"
               "       [--reads-reason] [--eintr-is-fatal] [--parks-in-handler] [--unplug] [--locked-in=own|checkpoint]\n"
               "       [--lose-answer=N] [--fail-ioctl=REQUEST]\n"
               "GO.pause: while this file exists, the vCPUs are paused\n"
               "GO.slow:  while this file exists, the first vCPU's accesses are not answered\n"
               "GO.dump:  names a file; all state of the VM is written there, once, when it is paused\n",
               name);
  std::exit(2);
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options options;
  const std::map<std::string, Irqchip> irqchips = {
      {"none", Irqchip::kNone}, {"split", Irqchip::kSplit}, {"full", Irqchip::kFull}};
  enum {
    kGuest = 1, kGo, kVcpus, kIrqchip, kStartAll, kSpare, kDontFork, kEventfds, kCoalesced, kDuplicates, kMask, kLose,
    kFailIoctl, kReadsReason, kFatal, kParks, kUnplug, kLockedIn
  };
  const option known[] = {{"guest", required_argument, nullptr, kGuest},
                          {"go", required_argument, nullptr, kGo},
                          {"vcpus", required_argument, nullptr, kVcpus},
                          {"irqchip", required_argument, nullptr, kIrqchip},
                          {"start-all", no_argument, nullptr, kStartAll},
                          {"spare", no_argument, nullptr, kSpare},
                          {"dont-fork", no_argument, nullptr, kDontFork},
                          {"eventfds", no_argument, nullptr, kEventfds},
                          {"coalesced", no_argument, nullptr, kCoalesced},
                          {"duplicates", no_argument, nullptr, kDuplicates},
                          {"signal-mask", no_argument, nullptr, kMask},
                          {"lose-answer", required_argument, nullptr, kLose},
                          {"reads-reason", no_argument, nullptr, kReadsReason},
                          {"eintr-is-fatal", no_argument, nullptr, kFatal},
                          {"parks-in-handler", no_argument, nullptr, kParks},
                          {"unplug", no_argument, nullptr, kUnplug},
                          {"locked-in", required_argument, nullptr, kLockedIn},
                          {"fail-ioctl", required_argument, nullptr, kFailIoctl},
                          {}};
  for (int found; (found = getopt_long(argc, argv, "", known, nullptr)) != -1;) {
    switch (found) {
      case kGuest: options.guest = optarg; break;
      case kGo: options.go_file = optarg; break;
      case kVcpus: options.vcpus = std::atoi(optarg); break;
      case kIrqchip:
        if (!irqchips.contains(optarg)) usage(argv[0]);
        options.irqchip = irqchips.at(optarg);
        break;
      case kStartAll: options.start_all = true; break;
      case kSpare: options.spare = true; break;
      case kDontFork: options.dont_fork = true; break;
      case kEventfds: options.eventfds = true; break;
      case kCoalesced: options.coalesced = true; break;
      case kDuplicates: options.duplicates = true; break;
      case kMask: options.signal_mask = true; break;
      case kReadsReason: options.reads_reason = true; break;
      case kFatal: options.eintr_is_fatal = true; break;
      case kParks: options.parks_in_handler = true; break;
      case kUnplug: options.unplug = true; break;
      case kLockedIn: options.locked_in = optarg; break;
      case kFailIoctl: options.fail_ioctl = std::strtoul(optarg, nullptr, 0); break;
      case kLose: options.lose_answer = std::atol(optarg); break;
      default: usage(argv[0]);
    }
  }
  bool complete = optind == argc && !options.guest.empty() && !options.go_file.empty();
  if (!complete || options.vcpus < 1 || options.vcpus > 16) usage(argv[0]);
  return options;
}

}  // namespace tiny
