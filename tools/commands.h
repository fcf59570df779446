// The verbs of the vmckpt command. argv[0] is the verb itself; the result is the exit status.
#pragma once

namespace vmckpt {

int cmd_launch(int argc, char** argv);
int cmd_checkpoint(int argc, char** argv);
int cmd_restart(int argc, char** argv);
int cmd_attach(int argc, char** argv);
int cmd_logs(int argc, char** argv);
int cmd_stop(int argc, char** argv);
int cmd_kill(int argc, char** argv);
int cmd_list(int argc, char** argv);
int cmd_inspect(int argc, char** argv);
int cmd_verify(int argc, char** argv);
int cmd_doctor(int argc, char** argv);

}  // namespace vmckpt
