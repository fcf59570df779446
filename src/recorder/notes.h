// The ledger's notes, as the wrappers write them (notes.cc).
#pragma once

#include <stdint.h>

#include "recorder/ledger.h"

namespace vmckpt {

// Replaces a note of the same kind, descriptor and value. `path` may be null.
void take_note(NoteKind kind, int fd, int64_t value, const char* path);
void forget_note(NoteKind kind, int fd, int64_t value);
void forget_notes_of(NoteKind kind, int fd);  // whatever their value
void forget_notes_lock();                     // in a forked child

}  // namespace vmckpt
