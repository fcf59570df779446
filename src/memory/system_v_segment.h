// System V shared memory (shmget(2), shmat(2)). Its pages are those of a CapturedFile; what is here makes the segment itself
// again, so that shmdt and shmctl know it.
#pragma once

#include <string>

#include "core/result.h"
#include "image/memory.pb.h"

namespace vmckpt {

// The name of such a segment's mapping in /proc/PID/maps.
bool is_system_v_name(const std::string& name);

// Key, owner and permissions of the segment with this id, from /proc/sysvipc/shm. Fails when the target is in another IPC
// namespace than the caller.
Result<pb::SystemVSegment> describe_segment(pid_t target, int id);

// Restart: makes the segment again and returns its id: the old one where that is to be had. A segment that the killed target
// left behind is used again; one that others are attached to is not touched.
Result<int> make_segment(const pb::SystemVSegment& segment);

}  // namespace vmckpt
