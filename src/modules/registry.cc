// Everything that a process and its threads have, but for memory (memory/) and open files (descriptor_kinds.inc), in the order
// in which it is saved, asked for, checked and restored.
#include "modules/module.h"

namespace vmckpt {

extern const StateModule kHostModule, kClocksModule, kHiddenStateModule, kCpuidModule, kPrivilegedFiltersModule, kThreadsModule,
    kMemoryModule, kAioModule, kProcessModule, kFiltersModule, kVirtualMachinesModule, kSignalsModule, kMemoryRulesModule,
    kTimersModule, kDescriptorsModule, kPluginsModule;

namespace {

constexpr const StateModule* kModules[] = {
    &kHostModule,               // the most likely reason why an image cannot be restarted comes first
    &kClocksModule,
    &kHiddenStateModule,        // what is refused is refused before anything is copied
    &kCpuidModule,              // before filters, which may forbid it
    &kPrivilegedFiltersModule,  // installed with rights that the credentials may not have any more: before these
    &kThreadsModule,            // the filters that are saved with them say what may be asked of them; sets credentials
    &kProcessModule,            // asks for AMX before any vCPU is made, which it fixes the size of; limits after credentials
    &kMemoryModule,             // the mappings, among which AIO and virtual machines find theirs
    &kAioModule,
    &kFiltersModule,            // last on a thread's tape: they take rights away
    &kVirtualMachinesModule,    // needs the guest's memory; before threads, which run it
    &kSignalsModule,            // actions before any thread could take a signal; pending ones when all threads are there
    &kMemoryRulesModule,        // when all memory has been made
    &kTimersModule,             // late: they do not run while the process is being built, and may be for one of its threads
    &kDescriptorsModule,
    &kPluginsModule,            // what this vmckpt does not have
};

}  // namespace

std::span<const StateModule* const> state_modules() { return kModules; }

}  // namespace vmckpt
